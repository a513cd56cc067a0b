"""Slots and who gets them. T tokens, E experts, k experts per token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from router_arms import build_router, decisions, groups_of

from lightning_base.routing import Switch, TopK
from lightning_base.routing.capacity import expert_capacity, within_capacity


@pytest.mark.parametrize(
    ("sizes", "experts", "k", "factor", "slots"),
    [
        ((8,), 2, 1, 1.0, [4]),  # 8 / 2
        ((5,), 2, 1, 1.25, [4]),  # 6.25 / 2 = 3.125, upwards
        ((10,), 1, 1, 1.1, [11]),  # 1.1 * 10 is 11.000000000000002 in floating point: still 11
        ((6,), 4, 2, 1.0, [3]),  # 6 * 2 / 4
        ((1, 0, 16), 8, 1, 2.0, [1, 0, 4]),  # 0.25 upwards, nothing, 4
    ],
)
def test_capacity_is_the_even_share_times_the_factor_rounded_up(sizes, experts, k, factor, slots) -> None:
    assert expert_capacity(groups_of(*sizes), experts, k, factor) == slots


@given(
    assignments=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=40),
    capacity=st.lists(st.integers(0, 4), min_size=3, max_size=3),
)
def test_each_expert_serves_its_queue_in_order(assignments: list[tuple[int, int]], capacity: list[int]) -> None:
    served: dict[tuple[int, int], int] = {}
    expected = []
    for group, expert in assignments:
        expected.append(served.get((group, expert), 0) < capacity[group])
        served[group, expert] = served.get((group, expert), 0) + 1
    group_index = torch.tensor([group for group, _ in assignments], dtype=torch.int64)
    expert_index = torch.tensor([expert for _, expert in assignments], dtype=torch.int64)
    assert within_capacity(group_index, expert_index, torch.tensor(capacity), 4).tolist() == expected


def switch_of_two(**options: float | str | None) -> Switch:
    """A Switch whose logits are the two coordinates of a token."""
    router = build_router("switch", width=2, num_experts=2, **options)
    assert isinstance(router, Switch)
    router.gate.weight.data = torch.eye(2)
    return router


LN3 = 1.0986122886681098
# Probabilities (3/4, 1/4) for the first three tokens, (1/4, 3/4) for the last.
FOUR_TOKENS = torch.tensor([[LN3, 0.0], [LN3, 0.0], [LN3, 0.0], [0.0, LN3]])
NO_IDS = torch.zeros(4, dtype=torch.int64)


def test_switch_drops_the_last_token_of_an_expert_without_slots() -> None:
    # ceil(1.0 * 4 / 2) = 2 slots each. Expert 0 is asked by tokens 0, 1, 2 and serves 0 and 1; expert 1 serves token 3.
    plan = switch_of_two(capacity_factor=1.0)(FOUR_TOKENS, NO_IDS, groups_of(4))
    assert decisions(plan) == [[(0, 0.75)], [(0, 0.75)], [], [(1, 0.75)]]
    assert plan.demand.tolist() == [3, 1]
    assert plan.load.tolist() == [2, 1]
    assert plan.tokens_left_behind.item() == 1
    # E sum f P, f = (3/4, 1/4), P = ((3 * 3/4 + 1/4) / 4, (3 * 1/4 + 3/4) / 4) = (5/8, 3/8): 2 (15/32 + 3/32) = 9/8.
    assert plan.losses["load_balancing_loss"].item() == pytest.approx(9 / 8)


def test_switch_counts_slots_in_each_group() -> None:
    # Two groups of two tokens, ceil(2 / 2) = 1 slot each: token 1 finds expert 0 taken, token 2 has a fresh one.
    plan = switch_of_two(capacity_factor=1.0)(FOUR_TOKENS, NO_IDS, groups_of(2, 2))
    assert decisions(plan) == [[(0, 0.75)], [], [(0, 0.75)], [(1, 0.75)]]
    assert plan.group_demand.tolist() == [[2, 0], [1, 1]]
    assert plan.capacity is not None
    assert plan.capacity.tolist() == [1, 1]


def test_switch_has_its_own_capacity_in_evaluation() -> None:
    router = switch_of_two(capacity_factor=1.0, evaluation_capacity_factor=1.5)
    assert len(router.train()(FOUR_TOKENS, NO_IDS, groups_of(4)).token_index) == 3
    assert len(router.eval()(FOUR_TOKENS, NO_IDS, groups_of(4)).token_index) == 4  # ceil(1.5 * 4 / 2) = 3 slots


def test_switch_without_a_capacity_drops_nothing() -> None:
    plan = switch_of_two(capacity_factor=None)(FOUR_TOKENS[:1].expand(4, 2), NO_IDS, groups_of(4))
    assert plan.capacity is None
    assert plan.load.tolist() == [4, 0]


def test_a_gate_of_one_has_the_gradient_of_the_probability() -> None:
    found = {}
    for gate in ("probability", "one"):
        router = switch_of_two(capacity_factor=None, gate=gate)
        plan = router(FOUR_TOKENS, NO_IDS, groups_of(4))
        (plan.weight * torch.arange(4.0)).sum().backward()
        found[gate] = (plan.weight.tolist(), plan.expert_index.tolist(), router.gate.weight.grad)
    assert found["one"][0] == [1.0] * 4
    assert found["probability"][0] == pytest.approx([0.75] * 4)
    assert found["one"][1] == found["probability"][1]
    assert torch.equal(found["one"][2], found["probability"][2])
    assert found["one"][2].abs().min() > 0.01
    with pytest.raises(ValueError, match=r"router\.gate=two: choose one of probability, one"):
        switch_of_two(gate="two")


# Preferences (0, 1, 2), (1, 0, 2), (1, 0, 2), with logits 2, 1 and -9.
THREE_TOKENS = torch.tensor([[2.0, 1.0, -9.0], [1.0, 2.0, -9.0], [1.0, 2.0, -9.0]])


def top_2_of_three(**options: object) -> TopK:
    router = build_router("top_k", width=3, num_experts=3, top_k=2, **options)
    assert isinstance(router, TopK)
    router.gate.weight.data = torch.eye(3)
    return router


@pytest.mark.parametrize(
    ("factor", "kept"),
    [
        # ceil(0.5 * 3 * 2 / 3) = 1 slot. First choices: token 0 takes expert 0, token 1 expert 1, token 2 is too late;
        # nothing is left for second choices.
        (0.5, {(0, 0), (1, 1)}),
        # 2 slots. First choices fill expert 1 with tokens 1 and 2, so that the second choice of token 0, though an
        # earlier token, is dropped; token 1's second choice takes the last slot of expert 0.
        (1.0, {(0, 0), (1, 1), (2, 1), (1, 0)}),
        (1.5, {(0, 0), (1, 1), (2, 1), (0, 1), (1, 0), (2, 0)}),  # 3 slots
    ],
)
def test_top_k_serves_first_choices_before_second_ones(factor: float, kept: set[tuple[int, int]]) -> None:
    plan = top_2_of_three(capacity_factor=factor)(THREE_TOKENS, NO_IDS[:3], groups_of(3))
    assert set(zip(plan.token_index.tolist(), plan.expert_index.tolist(), strict=True)) == kept
    assert plan.demand.tolist() == [3, 3, 0]


def test_top_k_gates_are_a_softmax_over_the_chosen_if_renormalized() -> None:
    # e^2 / (e^2 + e^1) = 0.73106 and the rest, 0.26894.
    plan = top_2_of_three()(THREE_TOKENS, NO_IDS[:3], groups_of(3))
    assert decisions(plan) == [[(0, 0.73106), (1, 0.26894)]] + [[(0, 0.26894), (1, 0.73106)]] * 2


def test_top_k_gates_are_probabilities_over_all_experts_otherwise() -> None:
    # Logits 0, 0, ln 2: probabilities 1/4, 1/4, 1/2; with k = 1 expert 2, at 1/2.
    router = build_router("top_k", width=3, num_experts=3, top_k=1, renormalize=False)
    assert isinstance(router, TopK)
    router.gate.weight.data = torch.eye(3)
    plan = router(torch.tensor([[0.0, 0.0, 0.6931471805599453]]), NO_IDS[:1], groups_of(1))
    assert decisions(plan) == [[(2, 0.5)]]


def test_top_1_without_renormalization_is_switch_without_capacity() -> None:
    top_k = build_router("top_k", top_k=1, renormalize=False)
    switch = build_router("switch", capacity_factor=None)
    switch.load_state_dict(top_k.state_dict())
    tokens, ids = torch.randn(30, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(30, dtype=torch.int64)
    one, other = (router(tokens, ids, groups_of(10, 20)) for router in (top_k, switch))
    assert decisions(one) == decisions(other)
    assert one.losses["load_balancing_loss"].item() == other.losses["load_balancing_loss"].item()


def test_uniform_goes_round_and_starts_anew_in_each_group() -> None:
    plan = build_router("uniform", num_experts=3)(
        torch.randn(7, 16), torch.zeros(7, dtype=torch.int64), groups_of(4, 3)
    )
    assert plan.expert_index.tolist() == [0, 1, 2, 0, 0, 1, 2]


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "key"), [("switch", "capacity_factor"), ("top_k", "capacity_factor")])
def test_a_capacity_factor_that_cannot_work_is_refused_by_name(name: str, key: str, factor: float) -> None:
    with pytest.raises(ValueError, match=rf"router\.{key}={factor}: a capacity factor is a number above 0"):
        build_router(name, **{key: factor})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("top_k", {"num_experts": 4, "top_k": 5}, r"router\.top_k=5 with router\.num_experts=4"),
        ("top_k", {"top_k": 0}, r"router\.top_k=0"),
        ("top_k", {"top_k": 1, "renormalize": True}, r"router\.renormalize=true .*set router\.renormalize=false"),
        ("switch", {"num_experts": 0}, r"router\.num_experts=0: .* at least 1 expert"),
        ("switch", {"evaluation_capacity_factor": 0.0}, r"router\.evaluation_capacity_factor=0\.0"),
        ("base", {"num_experts": 17}, r"router\.num_experts=17 exceeds model\.width=16"),
        ("base", {"solver": "guess"}, r"router\.solver=guess: choose one of .*transport"),
        ("dense", {"num_experts": 2}, r"router\.num_experts=2: the dense arm"),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_router(name, **options)
