"""GShard against algorithm 1 of its paper, written out token by token."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from router_arms import build_router, decisions, groups_of, random_tokens

from lightning_base.routing import GShard
from lightning_base.routing.noise import uniform_noise


def gshard(**options: object) -> GShard:
    router = build_router("gshard", **options)
    assert isinstance(router, GShard)
    return router


def gshard_of_three(**options: object) -> GShard:
    """A router whose logits are the three coordinates of a token."""
    router = gshard(width=3, num_experts=3, **options)
    router.gate.weight.data = torch.eye(3)
    return router


def algorithm_1(
    probabilities: list[list[float]], slots: float, draws: list[float]
) -> tuple[list[list[tuple[int, float]]], list[int], float]:
    """Experts with gates of each token, assignments asked for, and l_aux, for one group."""
    tokens, experts = len(probabilities), len(probabilities[0])
    taken, asked = [0] * experts, [0] * experts
    combine: list[list[tuple[int, float]]] = [[] for _ in range(tokens)]
    top_2 = [sorted(range(experts), key=lambda e, p=p: -p[e])[:2] for p in probabilities]
    for s, (e1, e2) in enumerate(top_2):
        asked[e1] += 1
        if taken[e1] < slots:
            taken[e1] += 1
            combine[s].append((e1, probabilities[s][e1] / (probabilities[s][e1] + probabilities[s][e2])))
    mean = [sum(p[e] for p in probabilities) / tokens for e in range(experts)]
    auxiliary = sum(asked[e] / tokens * mean[e] for e in range(experts)) / experts
    for s, (e1, e2) in enumerate(top_2):
        g2 = probabilities[s][e2] / (probabilities[s][e1] + probabilities[s][e2])
        if 2 * g2 > draws[s]:
            asked[e2] += 1
            if taken[e2] < slots:
                taken[e2] += 1
                combine[s].append((e2, g2))
    return combine, asked, auxiliary


@given(
    size=st.integers(1, 40),
    seed=st.integers(0, 1_000),
    factor=st.sampled_from([0.25, 0.5, 1.0, 1.5, None]),
    training=st.booleans(),
)
def test_it_is_algorithm_1(size: int, seed: int, factor: float | None, training: bool) -> None:
    router = gshard(num_experts=5, capacity_factor=factor, seed=seed).train(training)
    tokens, ids = random_tokens(size, seed)
    plan = router(tokens, ids, groups_of(size))
    # The draws are given: noise has tests of its own. In evaluation every second expert is asked.
    draws = uniform_noise(ids, groups_of(size), 1, key=int(router.key), step=0)[:, 0].tolist() if training else [0.0]
    probabilities = torch.softmax(tokens.double() @ router.gate.weight.detach().double().T, -1).tolist()
    slots = math.inf if factor is None else math.ceil(factor * 2 * size / 5)
    combine, asked, auxiliary = algorithm_1(probabilities, slots, draws if training else draws * size)
    for found, expected in zip(decisions(plan), combine, strict=True):
        assert [expert for expert, _ in found] == sorted(expert for expert, _ in expected)
        assert dict(found) == pytest.approx(dict(expected), abs=2e-5)
    assert plan.demand.tolist() == asked
    # E sum f P is E^2 times the paper's sum f P / E.
    assert plan.losses["load_balancing_loss"].item() == pytest.approx(25 * auxiliary, rel=1e-4)


def test_first_choices_are_served_before_second_ones() -> None:
    # Preferences (0, 1), (1, 0), (1, 0); ceil(0.5 * 2 * 3 / 3) = 1 slot. Token 0 takes expert 0 and token 1 expert 1;
    # token 2 comes too late, and no slot is left for a second choice.
    tokens = torch.tensor([[2.0, 1.0, -9.0], [1.0, 2.0, -9.0], [1.0, 2.0, -9.0]])
    plan = gshard_of_three(capacity_factor=0.5).eval()(tokens, torch.zeros(3, dtype=torch.int64), groups_of(3))
    # e^2 / (e^2 + e^1) = 0.73106: not 1, though the token has one expert only.
    assert decisions(plan) == [[(0, 0.73106)], [(1, 0.73106)], []]
    assert plan.demand.tolist() == [3, 3, 0]
    assert plan.capacity is not None
    assert plan.capacity.tolist() == [1]


def test_the_second_expert_is_asked_as_often_as_twice_its_gate() -> None:
    # Logits ln 4 and 0: gates 4/5 and 1/5, so asked with probability 2/5.
    tokens = torch.tensor([[math.log(4), 0.0, -30.0]]).repeat(5_000, 1)
    router = gshard_of_three(capacity_factor=None)
    ids = torch.randint(0, 100, (5_000,), generator=torch.Generator().manual_seed(0))
    plan = router(tokens, ids, groups_of(5_000))
    # The standard deviation of the frequency is sqrt(0.4 * 0.6 / 5000) = 0.0069.
    assert plan.demand[0].item() == 5_000
    assert plan.demand[1].item() / 5_000 == pytest.approx(0.4, abs=5 * 0.0069)
    assert plan.demand[2].item() == 0
    assert router.eval()(tokens, ids, groups_of(5_000)).demand.tolist() == [5_000, 5_000, 0]


def test_a_second_choice_that_was_not_asked_takes_no_slot() -> None:
    # Experts 0 and 1 have 2 * 1,000 slots for 1,000 first choices each: seconds compete only with seconds that asked.
    tokens = torch.tensor([[math.log(4), 0.0], [0.0, math.log(4)]]).repeat(1_000, 1)
    router = gshard(width=2, num_experts=2, capacity_factor=0.7)
    router.gate.weight.data = torch.eye(2)
    ids = torch.randint(0, 100, (2_000,), generator=torch.Generator().manual_seed(0))
    plan = router(tokens, ids, groups_of(2_000))
    # ceil(0.7 * 2 * 2,000 / 2) = 1,400 slots; about 1,400 ask. Counting those turned away would serve 400 of 1,000
    # seconds at random positions, about 160.
    assert plan.load.tolist() == [min(1_400, asked) for asked in plan.demand.tolist()]
    assert min(plan.load.tolist()) > 1_300


def test_the_loss_counts_first_choices_alone() -> None:
    # Probabilities (3/4, 1/4) twice and (1/4, 3/4) once: f = (2/3, 1/3), P = (7/12, 5/12).
    # 2 (2/3 * 7/12 + 1/3 * 5/12) = 2 * 19/36 = 19/18; with second choices f would be even and the loss 1.
    router = gshard(width=2, num_experts=2)
    router.gate.weight.data = torch.eye(2)
    tokens = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0], [0.0, math.log(3)]])
    plan = router(tokens, torch.zeros(3, dtype=torch.int64), groups_of(3))
    assert plan.losses["load_balancing_loss"].item() == pytest.approx(19 / 18)


def test_defaults_are_the_slots_of_the_paper() -> None:
    # C = 2 T / E: 2 * 24 / 8 = 6.
    plan = gshard()(*random_tokens(24), groups_of(24))
    assert plan.capacity is not None
    assert plan.capacity.tolist() == [6]
    assert plan.top_k == 2
    assert gshard().loss_coefficients == {"load_balancing_loss": 0.01}


@pytest.mark.parametrize(("factor", "causal"), [(1.0, False), (None, True)])
def test_it_is_causal_only_without_slots_to_compete_for(factor: float | None, causal: bool) -> None:
    router = gshard(capacity_factor=factor)
    assert (router.causal, router.causal_in_evaluation) == (causal, causal)
