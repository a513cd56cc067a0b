"""Mistakes that were published, each put in again on purpose: a check that the right code passes and the mistake fails.

T tokens, E experts, k experts per token, G routing groups, W ranks.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import program
import pytest
import pytorch_lightning as pl
import torch
from hand_made_plans import make_plan, plan_of_counts
from pytorch_lightning.strategies import SingleDeviceStrategy
from router_arms import WIDTH, build_router, groups_of, random_tokens
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_base.auxiliary_losses import auxiliary_losses, step_counts
from lightning_base.callbacks.clock import TrainingClock
from lightning_base.callbacks.flops import grouped_matmul_flops
from lightning_base.callbacks.metrics_csv import MetricsCsv
from lightning_base.metrics import ExpertLoad
from lightning_base.metrics.balance import max_vio
from lightning_base.metrics.compute import expert_flops
from lightning_base.metrics.specialization import choices_of, coactivation
from lightning_base.model import Transformer, initialize
from lightning_base.moe import Experts, SparseLayer
from lightning_base.routing import Router, RoutingGroups, RoutingPlan
from lightning_base.routing.losses import load_balancing_loss


def caught(check: Callable[[Any], None], mistake: Any) -> None:
    """The check fails on the mistake, and not because it cannot run."""
    with pytest.raises(AssertionError):
        check(mistake)


# An axis swapped, so that balance reads even under a twofold imbalance.


def reads_the_imbalance_of_each_group(measure: Callable[[Tensor], Tensor]) -> None:
    # Two groups of 12, each with loads 4 and 8: (8 - 6) / 6.
    assert measure(torch.tensor([[4, 8], [4, 8]])).tolist() == pytest.approx([1 / 3, 1 / 3])


def test_an_axis_swapped() -> None:
    reads_the_imbalance_of_each_group(max_vio)
    caught(reads_the_imbalance_of_each_group, lambda counts: max_vio(counts.T))


# A missing division by k, in the shares f_i = n_i / (T k).


def is_one_when_uniform_for_top_2(loss: Callable[[Tensor, Tensor, RoutingGroups], Tensor]) -> None:
    # 12 tokens, 4 experts, k = 2: each is asked by 6; E sum_i f_i P_i = 4 * 4 * (6/24 * 1/4).
    value = loss(torch.full((12, 4), 0.25), torch.tensor([[6, 6, 6, 6]]), groups_of(12))
    assert value.item() == pytest.approx(1.0)


def without_k(probabilities: Tensor, demand: Tensor, groups: RoutingGroups) -> Tensor:
    return demand.shape[1] * (demand.sum(0) / groups.num_tokens * probabilities.mean(0)).sum()


def test_a_missing_division_by_k() -> None:
    is_one_when_uniform_for_top_2(load_balancing_loss)
    caught(is_one_when_uniform_for_top_2, without_k)


def reads_a_drop_rate_per_assignment(rate: Callable[[RoutingPlan], float]) -> None:
    # 4 tokens with 2 experts each, of which 2 drop one token: 2 of 8.
    asked = [(t, e) for t in range(4) for e in (t % 2, 2 + t % 2)]
    assert rate(make_plan([asked], (4,), 4, top_k=2, capacity=[2], dropped=[(0, 0), (1, 1)])) == 0.25


def drop_rate(plan: RoutingPlan) -> float:
    metric = ExpertLoad(["layer"], plan.num_experts)
    metric.update({"layer": plan})
    return metric.compute()["window/drop_rate/layer"].item()


def test_a_drop_rate_per_token() -> None:
    reads_a_drop_rate_per_assignment(drop_rate)
    caught(reads_a_drop_rate_per_assignment, lambda plan: float(plan.asked - len(plan.token_index)) / plan.num_tokens)


# Loads counted twice under activation checkpointing, which calls each layer again in the backward pass.


def counts_every_token_once(count: Callable[[Transformer, Tensor], int]) -> None:
    model = Transformer(
        vocab_size=30,
        sequence_length=8,
        width=WIDTH,
        depth=2,
        heads=2,
        ffn_width=32,
        make_router=lambda: build_router("switch", num_experts=4, capacity_factor=None),
        routing_group=2,
        checkpoint_activations=True,
    )
    initialize(model, 0)
    assert count(model, torch.arange(32).view(4, 8) % 30) == 32


def from_plans(model: Transformer, ids: Tensor) -> int:
    metric = ExpertLoad(list(model.sparse_layers), 4)
    output = model(ids)
    output.logits.square().sum().backward()
    metric.update(output.plans)
    return int(metric.load.sum())


def inside_the_router(model: Transformer, ids: Tensor) -> int:
    seen: list[int] = []
    (layer,) = model.sparse_layers.values()
    layer.router.register_forward_hook(lambda _module, _given, plan: seen.append(int(plan.load.sum())))
    model(ids).logits.square().sum().backward()
    return sum(seen)


def test_loads_counted_twice_under_activation_checkpointing() -> None:
    counts_every_token_once(from_plans)
    caught(counts_every_token_once, inside_the_router)


# Padding counted as load.


class ByParity(Router):
    """The expert is the token's id, mod E."""

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        expert = (token_ids % self.num_experts).tolist()
        starts = [*groups.starts(), groups.num_tokens]
        asked = [[(t, expert[t]) for t in range(a, b)] for a, b in pairwise(starts)]
        return make_plan(asked, groups.sizes, self.num_experts, gate=1.0)


def finds_padded_sequences_even(load: Callable[[SparseLayer, Tensor, Tensor], Tensor]) -> None:
    layer = SparseLayer(ByParity(num_experts=2), Experts(num_experts=2, width=8, hidden_width=8), routing_group=1)
    initialize(layer, 0)
    # Two tokens for each expert, then padding, whose id 0 is even.
    ids = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    valid = torch.tensor([[True] * 4 + [False] * 2] * 2)
    assert load(layer, ids, valid).tolist() == [4, 4]


def test_padding_counted_as_load() -> None:
    finds_padded_sequences_even(lambda layer, ids, valid: layer(torch.randn(2, 6, 8), ids, valid)[1].load)
    caught(finds_padded_sequences_even, lambda layer, ids, valid: layer(torch.randn(2, 6, 8), ids)[1].load)


# The auxiliary loss scaled by the number of ranks. DDP averages gradients over ranks.

Finish = Callable[[list[RoutingPlan]], list[Tensor]]


def does_not_change_with_the_number_of_ranks(finish: Finish, scope: str) -> None:
    tokens, ids = random_tokens(64)
    found = []
    for world_size in (1, 2, 4):
        router = build_router("switch", num_experts=4, balance_scope=scope)
        share = 64 // world_size
        per_rank = [
            router(part, part_ids, groups_of(*[16] * (share // 16)))
            for part, part_ids in zip(tokens.split(share), ids.split(share), strict=True)
        ]
        mean = sum(finish(per_rank)) / world_size
        assert isinstance(mean, Tensor)
        mean.backward()
        found.append((mean.item(), router.gate.weight.grad))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-5)
        assert torch.allclose(gradient, found[0][1], rtol=1e-4, atol=1e-7)


def by_the_module(plans: list[RoutingPlan]) -> list[Tensor]:
    counts = [step_counts({"layer": plan}) for plan in plans]
    total = {key: sum(part[key] for part in counts) for key in counts[0]}
    coefficients = {"load_balancing_loss": 0.01}
    losses = [auxiliary_losses({"layer": plan}, coefficients, total, len(plans)) for plan in plans]
    return [loss["load_balancing_loss"] for loss in losses]


def summed_over_ranks(plans: list[RoutingPlan]) -> list[Tensor]:
    # All-reduced with the default operation, a sum, before DDP averages.
    return [sum(by_the_module(plans), torch.zeros(()))] * len(plans)


@pytest.mark.parametrize("scope", ["group", "step"])
def test_the_auxiliary_loss_scaled_by_the_number_of_ranks(scope: str) -> None:
    does_not_change_with_the_number_of_ranks(by_the_module, scope)
    with pytest.raises(AssertionError):
        does_not_change_with_the_number_of_ranks(summed_over_ranks, scope)


# An auxiliary loss without gradient, because it was built from counts alone.


def teaches_the_router(loss: Callable[[Tensor, Tensor, RoutingGroups], Tensor]) -> None:
    # f = (1, 0), E = 2, T = 2: the gradient is E f_i / T, 1 for the overloaded expert and 0 for the other.
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4]], requires_grad=True)
    value = loss(probabilities, torch.tensor([[2, 0]]), groups_of(2))
    (gradient,) = torch.autograd.grad(value, probabilities)
    assert gradient.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def from_counts(probabilities: Tensor, demand: Tensor, groups: RoutingGroups) -> Tensor:
    share = demand.sum(0) / demand.sum()
    # P_i taken from the choices: right in value when gates are certain, and constant. Kept in the graph by a zero.
    counted = torch.bincount(probabilities.argmax(1), minlength=demand.shape[1]) / len(probabilities)
    return demand.shape[1] * (share * counted).sum() + 0 * probabilities.sum()


def test_an_auxiliary_loss_built_from_counts_has_no_gradient() -> None:
    teaches_the_router(load_balancing_loss)
    caught(teaches_the_router, from_counts)


# Co-activation counted over neighbours in the order of the choices only: first with second, second with third.

Coactivation = Callable[[RoutingPlan], Tensor]


def counts_every_pair(measure: Coactivation) -> None:
    # k = 3. Token 0 chooses 0, 1, 2 in this order, token 1 chooses 0, 3, 2: 0 and 2 always go together.
    chosen = [[0, 1, 2], [0, 3, 2]]
    plan = make_plan([[(t, e) for t, experts in enumerate(chosen) for e in experts]], (2,), 4, top_k=3)
    # N(i and j) / N(i), row by row: expert 0 has both tokens, 1 the first, 2 both, 3 the second.
    expected = [[1, 0.5, 1, 0.5], [1, 1, 1, 0], [1, 0.5, 1, 0.5], [1, 0, 1, 1]]
    assert measure(plan).fill_diagonal_(1).tolist() == expected


def over_neighbours(plan: RoutingPlan) -> Tensor:
    chosen_TK = plan.expert_index.view(plan.num_tokens, plan.top_k)
    pairs = torch.zeros(plan.num_experts, plan.num_experts, dtype=torch.float64)
    for first, second in zip(chosen_TK.T, chosen_TK.T[1:], strict=False):
        for i, j in zip(first.tolist(), second.tolist(), strict=True):
            pairs[i, j] += 1
            pairs[j, i] += 1
    return pairs / plan.load[:, None]


def test_coactivation_counted_over_adjacent_choices_only() -> None:
    counts_every_pair(lambda plan: coactivation(choices_of([plan])))
    caught(counts_every_pair, over_neighbours)


# Throughput multiplied by the logging interval.

TOKENS, SECONDS, STEPS = 512, 0.02, 6


class Waits(pl.LightningModule):
    """A step of 512 tokens that takes 20 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        time.sleep(SECONDS)
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


def logged_rates(folder: Path, interval: int) -> list[tuple[int, float, float]]:
    """Step, tokens per second and seconds per step of a real fit."""
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        strategy=SingleDeviceStrategy(device="cpu"),
        callbacks=[TrainingClock(interval)],
        logger=MetricsCsv(folder / "metrics.csv", lambda: 0.0),
        log_every_n_steps=interval,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Waits(), DataLoader([{"targets_of_step": TOKENS}] * STEPS, batch_size=None))
    rates, times = (program.series(folder, f"train/{name}") for name in ("tokens_per_second", "step_time"))
    return [(step, rate, seconds) for (step, rate), (_, seconds) in zip(rates, times, strict=True)]


def is_tokens_over_time(rows: list[tuple[int, float, float]]) -> None:
    for _, rate, seconds in rows:
        assert rate * seconds == pytest.approx(TOKENS)
        # No faster than the sleep allows.
        assert rate <= TOKENS / SECONDS


@pytest.mark.parametrize("interval", [1, 3])
def test_throughput_multiplied_by_the_logging_interval(interval: int, tmp_path: Path) -> None:
    rows = logged_rates(tmp_path, interval)
    assert [step for step, _, _ in rows] == sorted({1, *range(interval, STEPS + 1, interval)})
    is_tokens_over_time(rows)
    if interval > 1:
        caught(is_tokens_over_time, [(step, rate * interval, seconds) for step, rate, seconds in rows])


# Top-1 set against top-2 as if they cost the same.

Cost = Callable[[RoutingPlan, int], float]


def tells_the_cost_of_k(cost: Cost) -> None:
    # 12 tokens at 4 experts, evenly, of width 16 and hidden width 24: what the matrix products of the layer take, by
    # torch's own counter, with k = 1 and with k = 2.
    for k in (1, 2):
        plan = plan_of_counts([3 * k] * 4, top_k=k)
        experts = Experts(num_experts=4, width=16, hidden_width=24)
        initialize(experts, 0)
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_matmul_flops})
        with counter, torch.no_grad():
            experts(torch.randn(12 * k, 16), plan.load)
        assert cost(plan, 24) == counter.get_total_flops()


def by_assignment(plan: RoutingPlan, hidden_width: int) -> float:
    return expert_flops(plan.load, entries=2 * 16 * hidden_width).sum().item()


def by_token(plan: RoutingPlan, hidden_width: int) -> float:
    return 12 * 4 * 16 * hidden_width


def test_top_1_set_against_top_2_as_if_they_cost_the_same() -> None:
    tells_the_cost_of_k(by_assignment)
    caught(tells_the_cost_of_k, by_token)
    # Experts half as wide make them cost the same.
    assert by_assignment(plan_of_counts([6] * 4, top_k=2), 12) == by_assignment(plan_of_counts([3] * 4), 24)
