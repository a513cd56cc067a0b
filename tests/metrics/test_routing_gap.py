"""Tokens whose set of experts differs between two plans, by hand and by sets. T tokens, E experts."""

import pytest
from hand_made_plans import make_plan
from hypothesis import given
from hypothesis import strategies as st
from router_arms import build_router, decisions, groups_of, random_tokens

from lightning_base.metrics.routing_gap import expert_sets, tokens_that_differ
from lightning_base.routing import RoutingPlan


def differ(one: RoutingPlan, other: RoutingPlan) -> int:
    return tokens_that_differ(expert_sets(one), expert_sets(other))


def test_by_hand() -> None:
    # Token 0 stays, token 1 moves, token 2 has its two experts in another order, token 3 has one of two exchanged,
    # token 4 loses one, token 5 has none either time.
    one = make_plan([[(0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 2)]], (6,), 3, top_k=2)
    other = make_plan([[(4, 0), (3, 0), (3, 2), (2, 1), (2, 0), (1, 2), (0, 0)]], (6,), 3, top_k=2)
    assert differ(one, other) == differ(other, one) == 3


experts = st.lists(st.sets(st.integers(0, 3)), min_size=0, max_size=8)


@given(one=experts, data=st.data())
def test_it_agrees_with_comparing_sets(one: list[set[int]], data) -> None:
    other = data.draw(st.lists(st.sets(st.integers(0, 3)), min_size=len(one), max_size=len(one)))
    plans = [
        make_plan([[(t, e) for t, chosen in enumerate(sets) for e in chosen]], (len(sets),), 4) for sets in (one, other)
    ]
    assert differ(*plans) == sum(a != b for a, b in zip(one, other, strict=True))


def test_greedy_and_balanced_base_differ_where_their_experts_do() -> None:
    router = build_router("base").eval()
    plans = []
    for mode in ("greedy", "balanced"):
        router.evaluation_mode = mode
        plans.append(router(*random_tokens(64), groups_of(32, 32)))
    greedy, balanced = ([[e for e, _ in token] for token in decisions(plan)] for plan in plans)
    expected = sum(a != b for a, b in zip(greedy, balanced, strict=True))
    assert differ(*plans) == expected > 0


def test_sets_of_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens and 3 experts, and of 2 tokens and 4 experts"):
        differ(make_plan([[]], (2,), 3), make_plan([[]], (2,), 4))
