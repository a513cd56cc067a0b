"""Generated problems for the solver tests, and independent ways to solve them."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from lightning_base.assignment.examples import EXAMPLES


def seeds(short: int, long: int) -> list[Any]:
    """Seeds to run by: so many always, the others only in the long form."""
    return [*range(short), *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(short, long))]


def random_scores(rng: np.random.Generator, num_tokens: int, num_experts: int) -> Tensor:
    """One of the kinds of scores that have broken solvers: ties, repeats, clusters, offsets, magnitudes, dtypes."""
    shape = (num_tokens, num_experts)
    kind = rng.integers(10)
    scores = rng.standard_normal(shape)
    if kind == 1:
        scores = rng.integers(-1, 2, shape).astype(float)  # three levels
    elif kind == 2:
        scores = np.full(shape, rng.standard_normal())  # constant
    elif kind == 3 and num_tokens:
        scores = scores[rng.integers(0, max(1, num_tokens // 4), num_tokens)]  # repeated tokens
    elif kind == 4:
        scores = scores + 5 * rng.standard_normal((1, num_experts))  # strong common mean
    elif kind == 5:
        scores = np.clip(3 * scores, -1, 1)
    elif kind == 6:
        scores = scores * 10.0 ** rng.integers(-30, 30)
    elif kind == 7:
        scores = rng.integers(-50, 50, shape).astype(float)
    elif kind == 8:
        scores = scores + 1000 * rng.standard_normal((num_tokens, 1))  # token offsets
    elif kind == 9:
        scores = np.outer(np.arange(num_tokens), np.arange(num_experts)).astype(float)  # Monge: long paths
    dtype = (torch.float32, torch.float64, torch.bfloat16, torch.float16)[rng.integers(2 if kind == 6 else 4)]
    return torch.from_numpy(scores).to(dtype)


def router_scores(rng: np.random.Generator, num_tokens: int, num_experts: int) -> Tensor:
    """One of the kinds of the benchmarks, in any dtype."""
    kind = list(EXAMPLES.values())[rng.integers(len(EXAMPLES))]
    scores = kind(num_tokens, num_experts, torch.Generator().manual_seed(int(rng.integers(2**31))))
    return scores.to((torch.float32, torch.float64, torch.bfloat16, torch.float16)[rng.integers(4)])


def adversarial_integers(rng: np.random.Generator, num_tokens: int, num_experts: int) -> Tensor:
    """Whole scores made to need long paths, large price differences or many ties; their sums are exact in double."""
    shape = (num_tokens, num_experts)
    token, expert = np.indices(shape)
    kind = rng.integers(6)
    if kind == 0:  # Monge: every path goes through the experts in order
        scores = token * expert
    elif kind == 1:  # a chain: each token likes two neighbours, and all crowd at one end
        home = np.minimum(rng.geometric(0.3, (num_tokens, 1)) - 1, num_experts - 1)
        scores = np.where(np.isin(expert - home, (0, 1)), 10, 0)
    elif kind == 2:  # each expert twice as dear as the one before
        scores = rng.integers(0, 3, shape) * 2**expert
    elif kind == 3:  # ties everywhere
        scores = rng.integers(0, 2, shape)
    elif kind == 4:  # differences in the last bits of large numbers
        scores = 2**30 + rng.integers(-2, 3, shape)
    else:  # few kinds of tokens, very unequal in number
        scores = rng.integers(-9, 10, shape)[np.minimum(rng.geometric(0.2, num_tokens), num_tokens) - 1]
    return torch.from_numpy(scores.astype(np.float64))


def random_start(rng: np.random.Generator, scores: Tensor) -> Tensor | None:
    """Prices to start from: none, or random ones from plausible to absurd, which must not change the optimum."""
    if rng.random() < 0.3:
        return None
    size = 10.0 ** rng.integers(-3, 4) * max(1e-30, scale_of(scores) / max(1, len(scores)))
    return torch.from_numpy(size * rng.standard_normal(scores.shape[1]))


def min_cost_flow(scores: Tensor, k: int = 1, capacities: np.ndarray | None = None) -> int | None:
    """Optimal objective of whole scores by OR-tools' min-cost flow in integers, or None if nothing is feasible."""
    graph = pytest.importorskip("ortools.graph.python.min_cost_flow", reason="needs the bench extra")
    T, E = scores.shape
    floor, extra = divmod(T * k, E) if capacities is None else (0, 0)
    room = np.full(E, floor) if capacities is None else np.asarray(capacities)
    token, expert = np.nonzero(np.isfinite(scores.double().numpy()))
    cost = -scores.double().numpy()[token, expert].astype(np.int64)
    flow = graph.SimpleMinCostFlow()
    flow.add_arcs_with_capacity_and_unit_cost(token, T + expert, np.ones(len(token), np.int64), cost)
    experts, free = T + np.arange(E), np.zeros(E, np.int64)
    flow.add_arcs_with_capacity_and_unit_cost(experts, np.full(E, T + E), room, free)
    flow.add_arcs_with_capacity_and_unit_cost(experts, np.full(E, T + E + 1), np.full(E, int(extra > 0)), free)
    supply = np.concatenate([np.full(T, k), free, [extra - T * k, -extra]])
    flow.set_nodes_supplies(np.arange(T + E + 2), supply)
    return -flow.optimal_cost() if flow.solve() == flow.OPTIMAL else None


def random_capacities(rng: np.random.Generator, num_tokens: int, num_experts: int, k: int) -> np.ndarray:
    """Loads of a random assignment of k distinct experts to each token: always feasible."""
    chosen = [rng.permutation(num_experts)[:k] for _ in range(num_tokens)]
    return np.bincount(np.concatenate(chosen) if chosen else np.empty(0, int), minlength=num_experts)


def integer_programme(scores: Tensor, k: int, capacities: np.ndarray | None) -> float | None:
    """Optimal objective by scipy's branch and bound, or None if nothing is feasible."""
    value = scores.double().numpy()
    T, E = value.shape
    allowed = np.isfinite(value)
    row = np.kron(np.eye(T), np.ones(E))
    column = np.kron(np.ones(T), np.eye(E))
    low = np.full(E, T * k // E) if capacities is None else capacities
    high = np.full(E, -(-T * k // E)) if capacities is None else capacities
    value = np.where(allowed, value, 0.0)
    result = milp(
        -value.ravel() / max(np.abs(value).max(), 1e-300),  # its tolerances are absolute
        constraints=[LinearConstraint(row, k, k), LinearConstraint(column, low, high)],
        bounds=Bounds(0, allowed.astype(float).ravel()),
        integrality=1,
        options={"mip_rel_gap": 0.0},
    )
    return None if result.x is None else float((value.ravel() * np.round(result.x)).sum())


def assert_balanced(expert: Tensor, num_experts: int, capacities: np.ndarray | None = None) -> None:
    """Loads equal the capacities, or floor or ceil of the mean; experts of one token are distinct."""
    load = torch.bincount(expert.flatten(), minlength=num_experts)
    assert len(load) == num_experts
    if capacities is not None:
        assert load.tolist() == list(capacities)
    else:
        mean = expert.numel() / num_experts
        assert load.min() >= np.floor(mean)
        assert load.max() <= np.ceil(mean)
    if expert.ndim == 2:
        ordered = expert.sort(dim=1).values
        assert (ordered[:, 1:] > ordered[:, :-1]).all()


def scale_of(scores: Tensor) -> float:
    """Sum over tokens of the largest finite magnitude: what a relative error of an objective is relative to."""
    finite = scores.double().where(scores.isfinite(), 0.0)
    return float(finite.abs().amax(1).sum()) if finite.numel() else 0.0
