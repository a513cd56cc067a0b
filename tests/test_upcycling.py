"""A dense arm's checkpoint as the start of arms with several experts. B sequences, L positions."""

from pathlib import Path

import pytest
import torch
from tiny_training import LENGTH, VOCABULARY, language_model

from lightning_base.instantiation import ConfigError
from lightning_base.module import LanguageModel
from lightning_base.program.build import load_weights
from lightning_base.program.checkpoint import VerifiedCheckpointIO


def save(module: LanguageModel, path: Path) -> Path:
    VerifiedCheckpointIO().save_checkpoint({"state_dict": module.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Path]:
    """A dense arm none of whose weights are as they were drawn, and its checkpoint."""
    module = language_model("dense", max_steps=1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return module, save(module, tmp_path_factory.mktemp("dense") / "step_1.ckpt")


@pytest.mark.parametrize(
    ("router", "options"),
    [("base", {"gate": "one"}), ("switch", {"gate": "one", "capacity_factor": None}), ("uniform", {})],
)
def test_every_expert_starts_as_the_one_of_the_dense_arm(
    dense: tuple[LanguageModel, Path], router: str, options: dict
) -> None:
    trained, path = dense
    module = language_model(router, max_steps=1, router_options=options)
    drawn = {name: value.clone() for name, value in module.state_dict().items()}
    load_weights(module, path)
    ids = torch.randint(0, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    expected = trained.double().model(ids).logits
    assert not torch.allclose(language_model(router, max_steps=1).double().model(ids).logits, expected, atol=0.1)
    torch.testing.assert_close(module.double().model(ids).logits, expected, atol=1e-11, rtol=0)
    for name, value in module.state_dict().items():
        if ".router." in name:
            assert torch.equal(value.to(drawn[name].dtype), drawn[name])


@pytest.mark.parametrize("source", ["dense", "switch"])
def test_a_rank_that_shares_the_experts_starts_with_its_own(
    source: str, dense: tuple[LanguageModel, Path], tmp_path: Path
) -> None:
    options = {"gate": "one", "capacity_factor": None}
    trained = language_model("switch", max_steps=1, router_options=options)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    path = dense[1] if source == "dense" else save(trained, tmp_path / "step_1.ckpt")
    whole = language_model("switch", max_steps=1, router_options=options)
    load_weights(whole, path)
    for rank in range(2):
        part = language_model("switch", max_steps=1, router_options=options, expert_share=(rank, 2))
        load_weights(part, path)
        for name, value in part.state_dict().items():
            expected = whole.state_dict()[name]
            assert torch.equal(value, expected[4 * rank :][:4] if name in part.expert_parameters else expected), name


def test_a_checkpoint_that_is_no_dense_arm_of_this_model_is_refused(
    dense: tuple[LanguageModel, Path], tmp_path: Path
) -> None:
    # Experts of half the width cannot be copies; eight experts are not four; a gate of another kind is no start either.
    with pytest.raises(ConfigError, match="does not fit the model"):
        load_weights(language_model("top_k", max_steps=1), dense[1])
    other = save(language_model("switch", max_steps=1, router_options={"num_experts": 4}), tmp_path / "step_1.ckpt")
    with pytest.raises(ConfigError, match="does not fit the model"):
        load_weights(language_model("switch", max_steps=1), other)
