"""What a training step does besides the gradient: weight decay, learning rate, and what routers are told of a step."""

import math

import pytest
import pytorch_lightning as pl
import torch
from tiny_training import GROUP, LENGTH, SEQUENCES, fit, language_model, micro_batches
from torch import Tensor

from lightning_base.module import LanguageModel
from lightning_base.routing import Router

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*log_every_n_steps")


def with_optimizer(router: str, **options: object) -> LanguageModel:
    module = language_model(router, max_steps=10)
    module.optimizer_options.update(options)
    return module


@pytest.mark.parametrize("router", ["base", "top_k"])
def test_matrices_decay_and_norms_embeddings_and_routers_do_not(router: str) -> None:
    module = with_optimizer(router, weight_decay=0.5)
    decayed, kept, routers = module.configure_optimizers()["optimizer"].param_groups
    assert (decayed["weight_decay"], kept["weight_decay"], routers["weight_decay"]) == (0.5, 0.0, 0.0)
    names = {id(parameter): name.removeprefix("model.") for name, parameter in module.named_parameters()}
    found = {names[id(parameter)] for parameter in decayed["params"]}
    assert len(decayed["params"]) + len(kept["params"]) + len(routers["params"]) == len(names)
    assert {names[id(p)] for p in routers["params"]} == {name for name in names.values() if "router" in name}
    # Of each of the two blocks the matrices of attention; of the first its feed-forward, of the second the experts.
    assert all("attention" in name or "feed_forward" in name for name in found)
    assert any("attention" in name for name in found)
    assert any("experts.w1" in name for name in found)
    spared = set(names.values()) - found
    assert {name for name in spared if "norm" in name} == {name for name in names.values() if "norm" in name}
    assert {name for name in spared if "router" in name} == {name for name in names.values() if "router" in name}
    assert any("router" in name for name in spared)
    assert any("norm" in name for name in spared)
    assert "embedding.weight" in spared


@pytest.mark.parametrize("router", ["base", "top_k", "hash"])
def test_routers_learn_at_a_rate_of_their_own(router: str) -> None:
    module = with_optimizer(router, router_learning_rate_factor=10.0)
    optimizer = module.configure_optimizers()["optimizer"]
    decayed, kept, routers = (group["initial_lr"] for group in optimizer.param_groups)
    assert decayed == kept == 3e-3
    assert routers == pytest.approx(3e-2)


@pytest.mark.parametrize("router", ["base", "switch"])
def test_a_scale_makes_routers_larger_and_nothing_else(router: str) -> None:
    usual = dict(language_model(router, max_steps=1).named_parameters())
    scaled = dict(language_model(router, max_steps=1, router_init_scale=10.0).named_parameters())
    assert set(usual) == set(scaled)
    for name, parameter in usual.items():
        torch.testing.assert_close(scaled[name], parameter * (10.0 if "router" in name else 1.0))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Up in fourths of the peak 4; then ten steps less three of warm-up, half of the way at 3 + 3.5.
        ("constant", {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 9: 4.0}),
        ("linear", {0: 1.0, 2: 3.0, 3: 4.0, 4: 4 - 3 / 7, 10: 1.0, 12: 1.0}),
        ("cosine", {0: 1.0, 3: 4.0, 4: 1 + 1.5 * (1 + math.cos(math.pi / 7)), 10: 1.0, 12: 1.0}),
    ],
)
def test_the_learning_rate_warms_up_and_falls_to_its_end(schedule: str, expected: dict[int, float]) -> None:
    options = {"learning_rate": 4.0, "final_learning_rate": 1.0, "warmup_steps": 3, "schedule": schedule}
    module = with_optimizer("uniform", **options)
    made = module.configure_optimizers()
    assert made["lr_scheduler"]["interval"] == "step"
    rates = {}
    for step in range(13):
        rates[step] = made["optimizer"].param_groups[0]["lr"]
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert {step: rates[step] for step in expected} == pytest.approx(expected)


class Told(Router):
    """A test double: round-robin, and keeps what it is told at the end of a step."""

    def __init__(self, inner: Router) -> None:
        super().__init__(num_experts=inner.num_experts)
        self.inner = inner
        self.heard: list[dict[str, float]] = []

    def forward(self, tokens: Tensor, token_ids: Tensor, groups):  # type: ignore[no-untyped-def]
        return self.inner(tokens, token_ids, groups)

    def step_sums(self, plan) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
        return {"tokens": torch.tensor(plan.num_tokens), "groups": torch.tensor(len(plan.groups.sizes))}

    def end_step(self, sums: dict[str, Tensor]) -> None:
        self.heard.append({name: float(value) for name, value in sums.items()})


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("recomputed", [False, True], ids=["stored", "recomputed"])
def test_a_router_is_told_of_each_step_once(accumulation: int, recomputed: bool) -> None:
    module = language_model("uniform", max_steps=3, activation_checkpointing=recomputed)
    (layer,) = module.model.sparse_layers.values()
    told = layer.router = Told(layer.router)
    batches = [batch for step in range(3) for batch in micro_batches(step, accumulation=accumulation)]
    fit(module, batches, pl.Callback(), accumulation=accumulation)
    assert told.heard == [{"tokens": SEQUENCES * LENGTH, "groups": SEQUENCES // GROUP}] * 3
