"""The exact solver against three independent ones: scipy's assignment, scipy's integer programme, OR-tools' flow."""

import numpy as np
import pytest
import torch

from lightning_base.assignment import balanced_assignment
from lightning_base.assignment.examples import EXAMPLES
from tests.assignment.cases import (
    assert_balanced,
    integer_programme,
    random_capacities,
    random_scores,
    scale_of,
)


@pytest.mark.parametrize("seed", range(20))
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


@pytest.mark.parametrize("seed", range(8))
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


@pytest.mark.parametrize("seed", range(10))
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
    graph = pytest.importorskip("ortools.graph.python.min_cost_flow", reason="needs the bench extra")
    scores = EXAMPLES[kind](T, E, torch.Generator().manual_seed(T + E))
    # Integer costs, so that the flow solver is exact: the scores are rounded to multiples of 2^-12 for both.
    cost = (scores.float() * 4096).round().to(torch.int64).numpy()
    flow = graph.SimpleMinCostFlow()
    token, expert = np.divmod(np.arange(T * E), E)
    flow.add_arcs_with_capacity_and_unit_cost(token, T + expert, np.ones(T * E, np.int64), -cost.ravel())
    floor, extra = divmod(T, E)
    sinks = np.arange(E)
    flow.add_arcs_with_capacity_and_unit_cost(T + sinks, np.full(E, T + E), np.full(E, floor), np.zeros(E, np.int64))
    flow.add_arcs_with_capacity_and_unit_cost(T + sinks, np.full(E, T + E + 1), np.ones(E, int), np.zeros(E, np.int64))
    supply = np.concatenate([np.ones(T, int), np.zeros(E, int), [-floor * E, -extra]])
    flow.set_nodes_supplies(np.arange(T + E + 2), supply)
    assert flow.solve() == flow.OPTIMAL
    ours = balanced_assignment(torch.from_numpy(cost).double(), certificate=True)
    assert_balanced(ours.expert, E)
    assert ours.objective == -flow.optimal_cost()
    assert abs(ours.gap or 0.0) <= 1e-9 * abs(ours.objective)


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


@pytest.mark.parametrize("k", [2, 3])
def test_the_certificate_closes_with_several_experts_per_token(k: int) -> None:
    scores = EXAMPLES["Zipf clusters"](2000, 24, torch.Generator().manual_seed(2))
    ours = balanced_assignment(scores, k=k, certificate=True)
    assert_balanced(ours.expert, 24)
    assert abs(ours.gap or 0.0) <= 1e-9 * scale_of(scores) * k
