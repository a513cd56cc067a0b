"""The exact solver against four others: scipy's assignment and integer programme, OR-tools' flow, POT's simplex."""

import numpy as np
import pytest
import torch

from lightning_base.assignment import balanced_assignment
from lightning_base.assignment.examples import EXAMPLES, VARIATIONS
from tests.assignment.cases import (
    adversarial_integers,
    assert_balanced,
    integer_programme,
    min_cost_flow,
    random_capacities,
    random_scores,
    random_start,
    router_scores,
    scale_of,
    seeds,
)


@pytest.mark.parametrize("seed", seeds(4, 20))
def test_objective_equals_the_oracle_on_many_small_problems(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(150):
        T, E = int(rng.integers(0, 40)), int(rng.integers(1, 12))
        scores = random_scores(rng, T, E)
        capacities = random_capacities(rng, T, E, 1) if rng.random() < 0.3 else None
        ours = balanced_assignment(scores, capacities=capacities, certificate=True)
        oracle = balanced_assignment(scores, capacities=capacities, solver="oracle")
        assert_balanced(ours.expert, E, capacities)
        assert_balanced(oracle.expert, E, capacities)
        tolerance = 1e-9 * abs(oracle.objective) + 1e-14 * scale_of(scores)
        assert abs(ours.objective - oracle.objective) <= tolerance
        assert ours.gap is not None
        assert abs(ours.gap) <= 1e-9 * scale_of(scores)


@pytest.mark.parametrize("seed", seeds(2, 8))
def test_forbidden_pairs_are_avoided_or_reported_as_the_oracle_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    outcomes = set()
    for _ in range(60):
        T, E = int(rng.integers(1, 25)), int(rng.integers(1, 7))
        scores = random_scores(rng, T, E)
        scores[torch.from_numpy(rng.random((T, E)) < rng.choice([0.1, 0.3, 0.6]))] = -torch.inf
        expected = integer_programme(scores, 1, None)
        outcomes.add(expected is None)
        if expected is None:
            for solver in ("transport", "oracle", "auction", "sinkhorn"):
                with pytest.raises(ValueError, match="forbidden"):
                    balanced_assignment(scores, solver=solver)
            continue
        ours = balanced_assignment(scores, certificate=True)
        assert_balanced(ours.expert, E)
        assert abs(ours.objective - expected) <= 1e-6 * scale_of(scores)  # the programme's own tolerance
        assert ours.gap is not None
        assert abs(ours.gap) <= 1e-9 * scale_of(scores)
    assert outcomes == {True, False}


@pytest.mark.parametrize("seed", seeds(2, 10))
def test_several_experts_per_token_equal_the_integer_programme(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(12):
        T, E = int(rng.integers(1, 20)), int(rng.integers(2, 7))
        k = int(rng.integers(1, E + 1))
        scores = random_scores(rng, T, E)
        capacities = random_capacities(rng, T, E, k) if rng.random() < 0.5 else None
        ours = balanced_assignment(scores, k=k, capacities=capacities, certificate=True)
        expected = integer_programme(scores, k, capacities)
        assert expected is not None
        assert ours.expert.shape == ((T, k) if k > 1 else (T,))
        assert_balanced(ours.expert, E, capacities)
        assert abs(ours.objective - expected) <= 1e-6 * scale_of(scores) * k
        assert ours.gap is not None
        assert abs(ours.gap) <= 1e-9 * scale_of(scores) * k


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize(("T", "E"), [(700, 8), (1000, 48), (3000, 24)])
def test_objective_equals_a_min_cost_flow_on_realistic_scores(kind: str, T: int, E: int) -> None:
    scores = EXAMPLES[kind](T, E, torch.Generator().manual_seed(T + E))
    # Integer costs, so that the flow solver is exact: the scores are rounded to multiples of 2^-12 for both.
    whole = (scores.double() * 4096).round()
    ours = balanced_assignment(whole, certificate=True)
    assert_balanced(ours.expert, E)
    assert ours.objective == min_cost_flow(whole)
    assert abs(ours.gap or 0.0) <= 1e-9 * abs(ours.objective)


@pytest.mark.parametrize("seed", seeds(2, 10))
def test_adversarial_integers_equal_a_min_cost_flow_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    infeasible = 0
    for _ in range(500):
        T, E = int(rng.integers(1, 200)), int(rng.integers(1, 20))
        k = int(rng.integers(1, min(E, 4) + 1)) if rng.random() < 0.3 else 1
        scores = adversarial_integers(rng, T, E)
        capacities = random_capacities(rng, T, E, k) if rng.random() < 0.3 else None
        if rng.random() < 0.3:
            scores[torch.from_numpy(rng.random((T, E)) < rng.choice([0.1, 0.5]))] = -torch.inf
        expected = min_cost_flow(scores, k, capacities)
        if expected is None:
            infeasible += 1
            with pytest.raises(ValueError, match="forbidden"):
                balanced_assignment(scores, k=k, capacities=capacities)
            continue
        ours = balanced_assignment(
            scores, k=k, capacities=capacities, prices=random_start(rng, scores), certificate=True
        )
        assert_balanced(ours.expert, E, capacities)
        assert ours.objective == expected
        assert ours.gap is not None
        assert abs(ours.gap) <= 1e-9 * (scale_of(scores) + 1) * k
    assert 0 < infeasible < 250


@pytest.mark.parametrize("seed", seeds(2, 20))
def test_long_searches_from_misleading_prices_equal_a_min_cost_flow_exactly(seed: int) -> None:
    # Every token may move, and experts hold far more than the 32 tokens from which on columns are read from tiles.
    rng = np.random.default_rng(seed)
    for _ in range(12):
        T, E = int(rng.integers(500, 2500)), int(rng.integers(2, 14))
        scores = (random_scores, router_scores, adversarial_integers)[rng.integers(3)](rng, T, E)
        scores = (scores.double() / float(scores.double().abs().max() or 1.0) * 2**16).round()
        capacities = random_capacities(rng, T, E, 1) if rng.random() < 0.3 else None
        ours = balanced_assignment(
            scores, capacities=capacities, prices=2**14 * torch.from_numpy(rng.standard_normal(E))
        )
        assert_balanced(ours.expert, E, capacities)
        assert ours.objective == min_cost_flow(scores, 1, capacities)


@pytest.mark.parametrize("seed", seeds(2, 10))
def test_every_kind_and_start_equals_the_oracle_where_samples_and_newton_steps_are_made(seed: int) -> None:
    # From 2048 scores on: prices from a sample, Newton steps, held tokens. The smaller problems above skip all of it.
    rng = np.random.default_rng(seed)
    for _ in range(150):
        T, E = int(rng.integers(160, 350)), int(rng.integers(13, 30))
        scores = (random_scores, router_scores, adversarial_integers)[rng.integers(3)](rng, T, E)
        capacities = random_capacities(rng, T, E, 1) if rng.random() < 0.2 else None
        oracle = balanced_assignment(scores, capacities=capacities, solver="oracle")
        for start in (None, random_start(rng, scores)):
            ours = balanced_assignment(scores, capacities=capacities, prices=start, certificate=True)
            assert_balanced(ours.expert, E, capacities)
            assert abs(ours.objective - oracle.objective) <= 1e-9 * abs(oracle.objective) + 1e-14 * scale_of(scores)
            assert ours.gap is not None
            assert abs(ours.gap) <= 1e-9 * scale_of(scores)


@pytest.mark.parametrize("seed", seeds(2, 5))
def test_real_scores_equal_the_network_simplex_in_double_precision(seed: int) -> None:
    ot = pytest.importorskip("ot", reason="needs the bench extra")
    rng = np.random.default_rng(seed)
    for _ in range(150):
        E = int(rng.integers(1, 24))
        T = E * int(rng.integers(1, 20))
        scores = (random_scores, router_scores)[rng.integers(2)](rng, T, E)
        capacities = random_capacities(rng, T, E, 1) if rng.random() < 0.3 else np.full(E, T // E)
        cost = -scores.double().numpy() / max(float(scores.abs().max()), 1e-300)  # its tolerances are absolute
        plan = ot.emd(np.ones(T), capacities.astype(float), cost, numItermax=10**7)
        ours = balanced_assignment(scores, capacities=capacities, prices=random_start(rng, scores))
        earned = cost[np.arange(T), ours.expert.numpy()].sum()
        assert earned == pytest.approx(float((plan * cost).sum()), abs=1e-9 * T)


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize(("T", "E"), [(4096, 16), (8192, 64), (5000, 100)])
@pytest.mark.parametrize("start", ["cold", "warm", "misleading"])
def test_the_certificate_closes_at_training_sizes(kind: str, T: int, E: int, start: str) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = EXAMPLES[kind](T, E, generator)
    prices = None
    if start == "warm":
        prices = balanced_assignment(scores).prices
    elif start == "misleading":
        prices = 10 * torch.randn(E, generator=generator)
    ours = balanced_assignment(scores, prices=prices, certificate=True)
    assert_balanced(ours.expert, E)
    assert abs(ours.gap or 0.0) <= 1e-9 * scale_of(scores)


@pytest.mark.parametrize(
    ("T", "E"), [(2000, 24), *(pytest.param(T, E, marks=pytest.mark.exhaustive) for T, E in [(4000, 60), (8192, 128)])]
)
@pytest.mark.parametrize(("kind", "variation"), [(kind, name) for kind in VARIATIONS for name in VARIATIONS[kind]])
def test_the_certificate_closes_on_every_variation(kind: str, variation: str, T: int, E: int) -> None:
    both = VARIATIONS[kind][variation](2 * T, E, torch.Generator().manual_seed(5))
    prices = balanced_assignment(both[:T]).prices
    for start in (None, prices):
        ours = balanced_assignment(both[T:], prices=start, certificate=True)
        assert_balanced(ours.expert, E)
        assert abs(ours.gap or 0.0) <= 1e-12 * scale_of(both[T:])


@pytest.mark.parametrize("k", [2, 3])
def test_the_certificate_closes_with_several_experts_per_token(k: int) -> None:
    scores = EXAMPLES["Zipf clusters"](2000, 24, torch.Generator().manual_seed(2))
    ours = balanced_assignment(scores, k=k, certificate=True)
    assert_balanced(ours.expert, 24)
    assert abs(ours.gap or 0.0) <= 1e-9 * scale_of(scores) * k
