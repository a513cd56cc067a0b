"""Routers and layers used by themselves, without the harness's model and its initialisation."""

import copy
from collections.abc import Iterator

import pytest
import torch
from omegaconf import OmegaConf
from router_arms import FOLDER, ROUTERS, VOCABULARY, build_router, decisions
from torch import Tensor

from lightning_base import BASE, Experts, Router, SparseLayer
from lightning_base.instantiation import instantiate

every_router = pytest.mark.parametrize("name", ROUTERS)


@pytest.fixture
def memory_that_shows() -> Iterator[None]:
    """What torch.empty gives is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def new_router(name: str, width: int) -> Router:
    node = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))
    return instantiate(node, "router", Router, width=width, vocab_size=VOCABULARY)


def spread(router: Router) -> dict[str, float]:
    return {name: parameter.std().item() for name, parameter in router.named_parameters()}


@pytest.mark.usefixtures("memory_that_shows")
@every_router
def test_a_router_is_drawn_when_it_is_built_as_its_paper_says(name: str) -> None:
    torch.manual_seed(0)
    router = new_router(name, width=512)
    assert all(bool(torch.isfinite(value.float()).all()) for value in router.state_dict().values())
    found = spread(router)
    drawn = copy.deepcopy(router)
    drawn.reset_parameters() if hasattr(drawn, "reset_parameters") else None
    # 8 x 512 numbers: their standard deviation is known to 1.1 percent. torch's own for a matrix is 1.8 times Switch's.
    assert found == pytest.approx(spread(drawn), rel=0.08)
    torch.manual_seed(1)
    other = new_router(name, width=512)
    assert all(
        not torch.equal(one, two) or not bool(one.any())
        for one, two in zip(router.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.usefixtures("memory_that_shows")
def test_experts_are_drawn_when_they_are_built() -> None:
    torch.manual_seed(0)
    experts = Experts(num_experts=4, width=64, hidden_width=256, sublayers=2)
    for w1, w2 in zip(experts.w1, experts.w2, strict=True):
        # Std 1 / sqrt(64); its own error over 65,536 draws is 0.3 percent.
        assert w1.std().item() == pytest.approx(0.125, rel=0.015)
        assert not bool(w2.any())


def base_layer() -> SparseLayer:
    torch.manual_seed(0)
    experts = Experts(num_experts=8, width=64, hidden_width=128, sublayers=2)
    layer = SparseLayer(BASE(num_experts=8, width=64), experts, routing_group=4)
    torch.nn.init.normal_(experts.w2[0], std=0.1)
    return layer


def test_a_layer_takes_hidden_states_alone() -> None:
    layer, hidden = base_layer(), torch.randn(16, 32, 64)
    output, plan = layer(hidden)
    # 4 groups of 4 sequences of 32 tokens, over 8 experts.
    assert plan.group_load.tolist() == [[16] * 8] * 4
    assert torch.equal(output, layer(hidden, torch.zeros(16, 32, dtype=torch.int64))[0])
    assert not torch.equal(output, hidden)


def test_tokens_without_a_batch_are_one_sequence() -> None:
    layer, tokens = base_layer(), torch.randn(40, 64)
    valid = torch.arange(40) < 33
    for mask in (None, valid):
        output, plan = layer(tokens, None, mask)
        expected, _ = layer(tokens[None], None, None if mask is None else mask[None])
        assert torch.equal(output, expected[0])
        assert plan.groups.sizes == (40 if mask is None else 33,)


def ids_matter(router: Router, training: bool) -> bool:
    """Whether other token ids change any decision about the same tokens."""
    router = copy.deepcopy(router).train(training)
    tokens = 3 * torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0))
    experts = Experts(num_experts=router.num_experts, width=16, hidden_width=8)
    layer = SparseLayer(router, experts, routing_group=2)

    def plan_for(ids: Tensor) -> list[list[tuple[int, float]]]:
        return decisions(copy.deepcopy(layer)(tokens, ids)[1])

    draws = torch.randint(VOCABULARY, (8, 4, 12), generator=torch.Generator().manual_seed(1))
    return len({str(plan_for(ids)) for ids in draws}) > 1


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@every_router
def test_what_a_router_says_about_token_ids_is_true(name: str, training: bool) -> None:
    router = build_router(name).train(training)
    for parameter in router.parameters():
        # Some papers start a matrix at zero, where noise alone decides or nothing does.
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    assert ids_matter(router, training) == router.needs_token_ids


@every_router
def test_routers_that_need_no_token_ids_work_without(name: str) -> None:
    router = build_router(name).train()
    experts = Experts(num_experts=router.num_experts, width=16, hidden_width=8)
    layer, hidden = SparseLayer(router, experts, routing_group=2), torch.randn(4, 12, 16)
    if router.needs_token_ids:
        with pytest.raises(ValueError, match=f"{type(router).__name__} routes by token ids"):
            layer(hidden)
    else:
        assert layer(hidden)[0].shape == hidden.shape
