"""Causal leak by hand: routers of which one knows what they tell earlier tokens. T tokens, E experts."""

import copy
from dataclasses import replace

import pytest
import torch
from hand_made_plans import make_plan
from router_arms import ROUTERS, WIDTH, build_router, groups_of, random_tokens
from torch import Tensor

from lightning_base.metrics.causality import before_the_cut, causal_leak, changes, drops_by_position
from lightning_base.routing import Router, RoutingGroups, RoutingPlan
from lightning_base.routing.plan import count_by_group


def changed(one: RoutingPlan, other: RoutingPlan) -> dict[str, list[int]]:
    """The tokens that change, by way."""
    found = changes(one, other)
    return {
        way: getattr(found, way).nonzero().flatten().tolist()
        for way in ("expert", "weight", "drop")
        if bool(getattr(found, way).any())
    }


def test_the_same_plan_changes_nothing() -> None:
    plan = make_plan([[(0, 1), (1, 0), (2, 1)]], (3,), 2)
    assert changed(plan, copy.deepcopy(plan)) == {}


def test_the_order_of_assignments_changes_nothing() -> None:
    one = make_plan([[(0, 0), (0, 1), (1, 2), (1, 0)]], (2,), 3, top_k=2)
    other = make_plan([[(1, 0), (0, 1), (1, 2), (0, 0)]], (2,), 3, top_k=2)
    assert changed(one, other) == {}


def test_another_expert_is_a_change_of_the_expert_alone() -> None:
    one = make_plan([[(0, 1), (1, 0), (2, 1)]], (3,), 2)
    other = make_plan([[(0, 1), (1, 1), (2, 1)]], (3,), 2)
    assert changed(one, other) == {"expert": [1]}


def test_another_gate_of_the_same_expert_is_a_change_of_the_weight_alone() -> None:
    pairs = [[(0, 1), (1, 0), (2, 1)]]
    assert changed(make_plan(pairs, (3,), 2, gate=0.5), make_plan(pairs, (3,), 2, gate=0.501)) == {"weight": [0, 1, 2]}


def test_rounding_of_a_gate_is_no_change() -> None:
    pairs = [[(0, 1), (1, 0)]]
    assert changed(make_plan(pairs, (2,), 2, gate=0.5), make_plan(pairs, (2,), 2, gate=0.5 + 1e-7)) == {}


def test_a_token_that_loses_its_slot_is_a_change_of_the_drop_alone() -> None:
    pairs = [[(0, 0), (1, 0), (2, 1)]]
    one = make_plan(pairs, (3,), 2, capacity=[1], dropped=[(1, 0)])
    other = make_plan(pairs, (3,), 2, capacity=[1], dropped=[(0, 0)])
    assert changed(one, other) == {"drop": [0, 1]}


def test_a_token_of_two_experts_dropped_by_the_other_one_still_asks_for_both() -> None:
    # Token 0 asks for experts 0 and 1 both times: first 1 drops it, then 0. Together two experts, no more than k.
    pairs = [[(0, 0), (0, 1), (1, 2), (1, 3)]]
    one = make_plan(pairs, (2,), 4, top_k=2, capacity=[1], dropped=[(0, 1)])
    other = make_plan(pairs, (2,), 4, top_k=2, capacity=[1], dropped=[(0, 0)])
    assert changed(one, other) == {"drop": [0]}


def test_more_experts_than_k_in_both_plans_together_cannot_all_have_been_asked_for_both_times() -> None:
    one = make_plan([[(0, 0), (0, 1)]], (1,), 3, top_k=2, capacity=[1])
    other = make_plan([[(0, 0), (0, 2)]], (1,), 3, top_k=2, capacity=[1], dropped=[(0, 0)])
    # Kept {0, 1}, then {2}: another expert, and one fewer of them.
    assert changed(one, other) == {"expert": [0], "drop": [0]}


def test_where_nothing_is_dropped_another_number_of_experts_is_another_choice_and_none_at_all_a_drop() -> None:
    # As by expert choice: token 0 has experts {0, 1}, then {0}; token 1 has {1}, then none.
    one = make_plan([[(0, 0), (0, 1), (1, 1)]], (2,), 2, top_k=1)
    other = make_plan([[(0, 0)]], (2,), 2, top_k=1)
    assert changed(one, other) == {"expert": [0, 1], "drop": [1]}


def test_plans_of_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens and 2 experts, and of 2 tokens and 2 experts"):
        changes(make_plan([[]], (3,), 2), make_plan([[]], (2,), 2))


def test_the_first_half_of_each_group_comes_before_the_cut() -> None:
    expected = [True, True, False, False, *(True, False, False), False]
    assert before_the_cut(RoutingGroups((4, 0, 3, 1))).tolist() == expected


class FromTheEnd(Router):
    """A test double: the expert is the token's id, and its slots are given to the last tokens of the group first."""

    slots = 4

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        token_index = torch.arange(len(tokens))
        demand = count_by_group(groups, self.num_experts, token_index, token_ids)
        served: dict[tuple[int, int], int] = {}
        kept = []
        group = groups.index().tolist()
        for t in reversed(range(len(tokens))):
            queue = (group[t], int(token_ids[t]))
            served[queue] = served.get(queue, 0) + 1
            if served[queue] <= self.slots:
                kept.append(t)
        where = torch.tensor(sorted(kept), dtype=torch.int64)
        capacity = torch.full((len(groups.sizes),), self.slots)
        weight = torch.ones(len(where))
        return RoutingPlan(where, token_ids[where], weight, demand, groups, capacity=capacity)


class LessTheMean(Router):
    """A test double: expert 0 for all, with a gate that depends on the mean over the group while training."""

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        token_index = torch.arange(len(tokens))
        expert_index = torch.zeros_like(token_index)
        means = torch.cat([part[:, 0].mean().expand(len(part)) for part in groups.split(tokens)])
        weight = torch.sigmoid(tokens[:, 0] - (means if self.training else 0.0))
        demand = count_by_group(groups, self.num_experts, token_index, expert_index)
        return RoutingPlan(token_index, expert_index, weight, demand, groups)


def leak(router: Router, ids: list[int], other: list[int], sizes: tuple[int, ...], *, training: bool) -> dict[str, int]:
    """The leak for tokens [T, 1] that hold their ids."""
    one, two = torch.tensor(ids), torch.tensor(other)
    columns = (one[:, None].float(), one, two[:, None].float(), two)
    return causal_leak(router, *columns, RoutingGroups(sizes), training=training)


def test_slots_given_to_later_tokens_first_leak_through_the_drop_alone() -> None:
    # 8 tokens, 4 slots. First the later four want expert 1, and all are served. When they want expert 0 instead, they
    # take its four slots, and the four earlier tokens are dropped.
    found = leak(FromTheEnd(num_experts=2), [0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0], (8,), training=True)
    assert found == {"expert": 0, "weight": 0, "drop": 4, "any": 4, "tokens": 4}


def test_with_half_of_the_later_tokens_changed_as_many_earlier_ones_are_dropped() -> None:
    found = leak(FromTheEnd(num_experts=2), [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1], (8,), training=False)
    assert found == {"expert": 0, "weight": 0, "drop": 2, "any": 2, "tokens": 4}


def test_a_gate_less_the_mean_of_the_group_leaks_through_every_weight_and_only_in_training() -> None:
    ids, other = [0, 1, 2, 3, 1, 1, 1, 1], [0, 0, 0, 0, 9, 9, 9, 9]
    # The second group of four keeps its later half (1, 1), so that nothing changes in it.
    router = LessTheMean(num_experts=2)
    first, second = (
        leak(router, ids[:4], other[4:], (4,), training=True),
        leak(router, ids[4:], ids[4:], (4,), training=True),
    )
    assert first == {"expert": 0, "weight": 2, "drop": 0, "any": 2, "tokens": 2}
    assert second == {"expert": 0, "weight": 0, "drop": 0, "any": 0, "tokens": 2}
    both = leak(router, ids, [*other[4:], *ids[4:]], (4, 4), training=True)
    assert both == {"expert": 0, "weight": 2, "drop": 0, "any": 2, "tokens": 4}
    assert leak(router, ids, other, (4, 4), training=False)["any"] == 0


def test_balanced_assignment_leaks_through_the_expert_and_greedy_choice_does_not() -> None:
    # Scores are the tokens' own coordinates. Tokens 0 and 1 prefer expert 0 by 1; the later ones prefer expert 1, so
    # both halves get what they want. Replaced by tokens that prefer expert 0 by 5, these take it, and 0 and 1 give way.
    router = build_router("base", width=2, num_experts=2)
    with torch.no_grad():
        router.centroids.copy_(torch.eye(2))
    tokens = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    other = torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 0.0], [5.0, 0.0]])
    ids = torch.zeros(4, dtype=torch.int64)
    balanced = causal_leak(router, tokens, ids, other, ids, groups_of(4), training=True)
    assert balanced == {"expert": 2, "weight": 0, "drop": 0, "any": 2, "tokens": 2}
    greedy = causal_leak(router, tokens, ids, other, ids, groups_of(4), training=False)
    assert greedy == {"expert": 0, "weight": 0, "drop": 0, "any": 0, "tokens": 2}
    router.evaluation_mode = "balanced"
    assert causal_leak(router, tokens, ids, other, ids, groups_of(4), training=False) == balanced


def leak_of(name: str, *, training: bool, seeds: int = 3, **options: object) -> dict[str, int]:
    """Summed over seeds, two groups of 24 tokens; every other seed with later tokens all alike, so that experts are
    full."""
    router, total = build_router(name, **options), {"tokens": 0}
    for seed in range(seeds):
        (tokens, ids), (other, other_ids) = random_tokens(48, seed), random_tokens(48, seed + 100)
        if seed % 2:
            other = other[:1].expand_as(other)
        found = causal_leak(router, tokens, ids, other, other_ids, groups_of(24, 24), training=training)
        total = {way: total.get(way, 0) + count for way, count in found.items()}
    return total


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_that_declares_itself_causal_leaks_nothing(name: str, training: bool) -> None:
    router = build_router(name)
    declared = router.causal if training else router.causal_in_evaluation
    found = leak_of(name, training=training)
    assert found["tokens"] == 3 * 24
    assert not declared or found["any"] == 0


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_switch_drops_by_what_came_before_and_leaks_nothing_however_few_its_slots(training: bool) -> None:
    found = leak_of("switch", training=training, capacity_factor=0.5, evaluation_capacity_factor=0.5)
    assert found == {"expert": 0, "weight": 0, "drop": 0, "any": 0, "tokens": 72}


def test_first_choices_before_second_ones_leak_through_the_drop_alone() -> None:
    found = leak_of("top_k", training=True, top_k=2, capacity_factor=0.5)
    assert found["expert"] == found["weight"] == 0
    assert found["drop"] == found["any"] > 0


@pytest.mark.parametrize("name", ROUTERS)
def test_measuring_leaves_the_router_as_it_was(name: str) -> None:
    for mode in (True, False):
        router = build_router(name).train(mode)
        before, random = copy.deepcopy(router.state_dict()), torch.get_rng_state()
        tokens, ids = random_tokens(16)
        for training in (True, False):
            causal_leak(router, tokens, ids, tokens.roll(8, 0), ids.roll(8), groups_of(16), training=training)
        assert all(module.training == mode for module in router.modules())
        assert before.keys() == router.state_dict().keys()
        assert all(torch.equal(before[key], value) for key, value in router.state_dict().items())
        assert torch.equal(random, torch.get_rng_state())
        assert all(parameter.grad is None for parameter in router.parameters())


def test_groups_too_small_to_cut_count_no_tokens() -> None:
    tokens, ids = torch.randn(2, WIDTH), torch.tensor([1, 2])
    found = causal_leak(build_router("switch"), tokens, ids, -tokens, ids, groups_of(1, 0, 1), training=True)
    assert found == {"expert": 0, "weight": 0, "drop": 0, "any": 0, "tokens": 0}


def test_drops_are_counted_where_in_the_group_they_happen() -> None:
    # Two groups, of 8 and of 4 tokens, in 4 bins: 2 and 1 tokens to a bin. All ask for expert 0; it keeps the first 4
    # of the first group and the first 2 of the second. So bins 2 and 3 drop all their 3 tokens.
    asked = [[(t, 0) for t in range(8)], [(t, 0) for t in range(8, 12)]]
    dropped = [(t, 0) for t in (4, 5, 6, 7, 10, 11)]
    plan = make_plan(asked, (8, 4), 2, capacity=[4, 2], dropped=dropped)
    found = drops_by_position(plan, 4)
    assert [side.tolist() for side in found] == [[3, 3, 3, 3], [0, 0, 3, 3]]


def test_a_group_shorter_than_the_bins_leaves_some_empty() -> None:
    # Positions 0, 1, 2 of 3 in 8 bins: floor(8 p / 3) = 0, 2, 5. With k = 2 each token asks twice; token 1 loses one.
    asked = [[(t, e) for t in range(3) for e in range(2)]]
    plan = make_plan(asked, (3,), 2, top_k=2, capacity=[2], dropped=[(1, 0)])
    assert [side.tolist() for side in drops_by_position(plan, 8)] == [
        [2, 0, 2, 0, 0, 2, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 0],
    ]


def test_where_nothing_is_dropped_no_position_drops() -> None:
    # Expert choice: token 0 has two experts, token 1 none, which is nobody's drop.
    plan = make_plan([[(0, 0), (0, 1)]], (2,), 2)
    assert [side.tolist() for side in drops_by_position(plan, 2)] == [[2, 0], [0, 0]]


def test_a_second_choice_that_was_never_asked_is_no_drop() -> None:
    # k = 2, 4 tokens in 2 bins. Tokens 0 and 3 ask for one expert, 1 and 2 for two; expert 0 turns token 3 away.
    asked = [[(0, 0), (1, 0), (2, 0), (3, 0), (1, 1), (2, 1)]]
    plan = make_plan(asked, (4,), 2, top_k=2, capacity=[3], dropped=[(3, 0)])
    said = replace(plan, aux={"asked": torch.tensor([1, 2, 2, 1])})
    assert [side.tolist() for side in drops_by_position(said, 2)] == [[3, 3], [0, 1]]
    assert drops_by_position(plan, 2) is None, "which tokens asked for one is not known"


@pytest.mark.parametrize("name", ROUTERS)
def test_drops_of_all_positions_are_the_drops_of_the_plan(name: str) -> None:
    router = build_router(name)
    tokens, ids = random_tokens(64)
    plan = router(tokens[:1].expand_as(tokens), ids, groups_of(40, 24))  # all alike: some expert is full
    asked_N, dropped_N = drops_by_position(plan, 4)
    assert int(asked_N.sum()) == int(plan.asked)
    assert int(dropped_N.sum()) == int(plan.asked) - len(plan.token_index)
    assert name not in ("gshard", "switch") or int(dropped_N.sum()) > 0
