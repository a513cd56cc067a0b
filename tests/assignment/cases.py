"""Generated problems for the solver tests, and independent ways to solve them."""

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor


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
