"""ExpertLoad on plans written by hand. E experts, T tokens, k experts per token, n assignments per expert."""

import math

import pytest
import torch
from hand_made_plans import make_plan, plan_of_counts
from router_arms import build_router
from torch import Tensor

from lightning_base.metrics import ExpertLoad
from lightning_base.model import Transformer, initialize
from lightning_base.moe import Experts, SparseLayer
from lightning_base.routing import Router, RoutingGroups, RoutingPlan


def measured(*plans: RoutingPlan) -> dict[str, float]:
    """The metrics of one layer called "layer" after one update per plan, without summaries over layers."""
    metric = ExpertLoad(["layer"], plans[0].num_experts)
    for plan in plans:
        metric.update({"layer": plan})
    return {
        name.removesuffix("/layer"): value.item() for name, value in metric.compute().items() if name.endswith("/layer")
    }


def subset(values: dict[str, float], expected: dict[str, float]) -> dict[str, float]:
    return {name: values[name] for name in expected}


@pytest.mark.parametrize("side", ["demand", "load"])
@pytest.mark.parametrize("scope", ["window", "group"])
@pytest.mark.parametrize(
    ("counts", "values"),
    [
        ([4, 4, 4, 4], {"max_vio": 0, "min_load": 1, "load_entropy": 1, "gini": 0, "load_cv": 0, "dead_experts": 0}),
        (
            [16, 0, 0, 0],
            {
                "max_vio": 3,
                "min_load": 0,
                "load_entropy": 0,
                "gini": 0.75,
                "load_cv": math.sqrt(3),
                "dead_experts": 0.75,
            },
        ),
        ([4, 8], {"max_vio": 1 / 3, "min_load": 2 / 3, "gini": 1 / 6, "load_cv": 1 / 3, "dead_experts": 0}),
    ],
    ids=["uniform", "collapsed", "two-fold"],
)
def test_balance_before_and_after_the_drop_in_both_scopes(counts, values, scope, side) -> None:
    expected = {f"{scope}/{name}/{side}": value for name, value in values.items()}
    assert subset(measured(plan_of_counts(counts)), expected) == pytest.approx(expected)


def test_drops_show_in_rates_and_make_the_load_but_not_the_demand_look_balanced() -> None:
    # 8 tokens ask as (6, 2); 2 slots each: 4 computed, 4 of 8 dropped and left behind, all 4 slots used.
    plan = plan_of_counts([6, 2], capacity=[2], dropped=[(2, 0), (3, 0), (4, 0), (5, 0)])
    expected = {
        "window/max_vio/demand": 0.5,  # (6 - 4) / 4
        "window/max_vio/load": 0.0,
        "group/max_vio/demand": 0.5,
        "group/max_vio/load": 0.0,
        "window/drop_rate": 0.5,
        "window/tokens_left_behind": 0.5,
        "window/capacity_usage": 1.0,
    }
    assert subset(measured(plan), expected) == pytest.approx(expected)


def test_capacity_usage_is_the_share_of_slots_filled() -> None:
    # 3 + 1 tokens, 2 slots each, one dropped: 3 of 4 slots.
    plan = plan_of_counts([3, 1], capacity=[2], dropped=[(2, 0)])
    expected = {"window/capacity_usage": 0.75, "window/drop_rate": 0.25, "window/tokens_left_behind": 0.25}
    assert subset(measured(plan), expected) == pytest.approx(expected)
    # A second group of 2 tokens with 1 slot each, one filled: 4 of 6.
    other = plan_of_counts([2, 0], capacity=[1], dropped=[(1, 0)])
    assert measured(plan, other)["window/capacity_usage"] == pytest.approx(4 / 6)


def test_a_token_that_asks_for_fewer_than_k_experts_drops_nothing_by_that() -> None:
    # k = 2, 4 tokens: 6 asked of 8 possible, 1 turned away. Of those asked: 1/6, not 1/8 and not 3/8.
    asked = [[(0, 0), (1, 0), (2, 0), (3, 0), (1, 1), (2, 1)]]
    plan = make_plan(asked, (4,), 2, top_k=2, capacity=[3], dropped=[(3, 0)])
    expected = {"window/drop_rate": 1 / 6, "window/tokens_left_behind": 1 / 4}
    assert subset(measured(plan), expected) == pytest.approx(expected)


def test_a_router_without_capacity_or_probabilities_reports_neither() -> None:
    values = measured(plan_of_counts([2, 2]))
    assert "window/capacity_usage" not in values
    assert "window/gate_entropy" not in values
    assert values["window/drop_rate"] == 0


def test_rates_of_top_2_are_per_assignment_and_left_behind_is_per_token() -> None:
    # 4 tokens, 8 assignments, 2 per expert. Token 0 loses both, token 1 one: 3 of 8 dropped, 1 of 4 left behind.
    asked = [(0, 0), (1, 1), (2, 2), (3, 3), (0, 1), (1, 2), (2, 3), (3, 0)]
    plan = make_plan([asked], (4,), 4, top_k=2, capacity=[2], dropped=[(0, 0), (0, 1), (1, 2)])
    expected = {
        "window/drop_rate": 3 / 8,
        "window/tokens_left_behind": 1 / 4,
        "window/capacity_usage": 5 / 8,
        "window/max_vio/demand": 0.0,
        "window/max_vio/load": 2 / 1.25 - 1,  # loads 1, 1, 1, 2
        "window/min_load/load": 0.8,
    }
    assert subset(measured(plan), expected) == pytest.approx(expected)


def test_router_confidence_is_the_mean_gate_of_the_assignments_kept() -> None:
    # 4 kept at 0.5 and, of the other four, 2 kept at 0.8: (2 + 1.6) / 6 = 0.6.
    dropped = plan_of_counts([3, 1], gate=0.8, capacity=[1], dropped=[(0, 0), (1, 0)])
    assert measured(plan_of_counts([2, 2]), dropped)["window/router_confidence"] == pytest.approx(0.6)


def test_gate_entropy_is_the_mean_over_tokens() -> None:
    # ln 4 for an even token, 0 for a certain one (0 ln 0 = 0), ln 2 for one of two halves; mean (3 ln 2) / 3.
    probabilities = [[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]
    plan = plan_of_counts([3, 0, 0, 0], probabilities=probabilities)
    assert measured(plan)["window/gate_entropy"] == pytest.approx(math.log(2))


def test_one_rank_is_never_overloaded() -> None:
    assert measured(plan_of_counts([16, 0]))["window/overload_factor"] == 1


def test_groups_that_collapse_on_different_experts_are_even_only_in_the_window() -> None:
    plan = make_plan([[(0, 0), (1, 0)], [(2, 1), (3, 1)]], (2, 2), 2)
    expected = {"window/max_vio/demand": 0.0, "group/max_vio/demand": 1.0, "group/dead_experts/load": 0.5}
    assert subset(measured(plan), expected) == pytest.approx(expected)


def test_groups_that_are_all_padding_are_left_out_of_the_mean_over_groups() -> None:
    with_empty = make_plan([[(0, 0), (1, 1)], [], [(2, 0), (3, 0)]], (2, 0, 2), 2)
    without = make_plan([[(0, 0), (1, 1)], [(2, 0), (3, 0)]], (2, 2), 2)
    assert measured(with_empty) == pytest.approx(measured(without))
    assert measured(with_empty)["group/max_vio/demand"] == pytest.approx(0.5)  # (0 + 1) / 2


def two_halves_and_whole() -> tuple[RoutingPlan, RoutingPlan, RoutingPlan]:
    first = make_plan([[(0, 0), (1, 0), (2, 1)]], (3,), 2, capacity=[1], dropped=[(1, 0)])
    second = make_plan([[(0, 1), (1, 1)]], (2,), 2, capacity=[1], dropped=[(1, 1)])
    whole = make_plan(
        [[(0, 0), (1, 0), (2, 1)], [(3, 1), (4, 1)]], (3, 2), 2, capacity=[1, 1], dropped=[(1, 0), (4, 1)]
    )
    return first, second, whole


def test_accumulating_two_micro_batches_is_one_update_with_both() -> None:
    first, second, whole = two_halves_and_whole()
    assert measured(first, second) == pytest.approx(measured(whole))
    assert measured(whole)["window/drop_rate"] == pytest.approx(0.4)


def test_calling_the_metric_gives_this_batch_and_keeps_the_sum() -> None:
    first, second, whole = two_halves_and_whole()
    metric = ExpertLoad(["layer"], 2)
    of_batch = [metric({"layer": plan})["window/drop_rate/layer"].item() for plan in (first, second)]
    assert of_batch == pytest.approx([1 / 3, 1 / 2])
    values = {k.removesuffix("/layer"): v.item() for k, v in metric.compute().items() if k.endswith("/layer")}
    assert values == pytest.approx(measured(whole))


def test_a_reset_forgets() -> None:
    metric = ExpertLoad(["layer"], 2)
    metric.update({"layer": plan_of_counts([4, 0])})
    metric.reset()
    metric.update({"layer": plan_of_counts([2, 2])})
    assert metric.compute()["window/max_vio/demand/layer"].item() == 0


def test_layers_are_kept_apart_and_summarised_by_mean_and_max() -> None:
    metric = ExpertLoad(["low", "high"], 2)
    metric.update({"high": plan_of_counts([4, 0]), "low": plan_of_counts([2, 2])})
    values = metric.compute()
    found = {name: values[f"window/max_vio/load/{name}"].item() for name in ("low", "high", "mean", "max")}
    assert found == {"low": 0.0, "high": 1.0, "mean": 0.5, "max": 1.0}


class ByTokenId(Router):
    """A test double: the expert is the token's id, mod E."""

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        token_index = torch.arange(len(tokens))
        expert_index = token_ids % self.num_experts
        index = groups.index() * self.num_experts + expert_index
        demand = torch.bincount(index, minlength=len(groups.sizes) * self.num_experts)
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=torch.ones(len(tokens)),
            group_demand=demand.view(-1, self.num_experts),
            groups=groups,
        )


def test_padding_is_no_load() -> None:
    router = ByTokenId(num_experts=2)
    experts = Experts(num_experts=2, width=8, hidden_width=8)
    experts.reset_parameters()
    layer = SparseLayer(router, experts, routing_group=1)
    # Each sequence holds two tokens for expert 0 and two for expert 1, then padding of id 0.
    ids = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    valid = torch.tensor([[True] * 4 + [False] * 2] * 2)
    _, plan = layer(torch.randn(2, 6, 8), ids, valid)
    _, counted = layer(torch.randn(2, 6, 8), ids)
    assert measured(plan)["window/max_vio/demand"] == 0
    assert plan.demand.tolist() == [4, 4]
    # What counting the padding would read: 8 of 12 for expert 0, (8 - 6) / 6.
    assert measured(counted)["window/max_vio/demand"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["base", "switch", "top_k"])
def test_activation_checkpointing_does_not_count_loads_twice(name: str) -> None:
    ids = torch.randint(0, 30, (4, 8), generator=torch.Generator().manual_seed(0))
    found, calls = [], []
    for checkpointed in (False, True):
        model = Transformer(
            vocab_size=30,
            sequence_length=8,
            width=16,
            depth=2,
            heads=2,
            ffn_width=32,
            make_router=lambda: build_router(name, num_experts=4),
            routing_group=2,
            checkpoint_activations=checkpointed,
        )
        initialize(model, 0)
        (layer,) = model.sparse_layers.values()
        seen: list[int] = []
        layer.router.register_forward_hook(lambda module, args, plan, seen=seen: seen.append(len(args[0])))
        metric = ExpertLoad(list(model.sparse_layers), 4)
        output = model(ids)
        metric.update(output.plans)
        output.logits.sum().backward()
        found.append({key: value.item() for key, value in metric.compute().items()})
        assert metric.tokens.tolist() == [32]
        calls.append(sum(seen))
    assert found[0] == found[1]
    # Counting inside the router, as a hook does, would read twice the tokens.
    assert calls == [32, 64]
