"""The exact solver: balanced assignment as a transportation problem with one price per expert.

Legend: T tokens, E experts, N tokens that may still move.
"""

import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_base.assignment.kernel import announce_compilation
from lightning_base.assignment.passes import best_k, best_two, place_rows
from lightning_base.assignment.problem import Loads
from lightning_base.assignment.residual import BALANCED, rebalance


def solve_transport(
    scores_TE: Tensor, loads: Loads, start_E: NDArray[np.float64] | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Exact assignment [T, k] and prices [E] of finite-or--inf CPU scores with every capacity at least one."""
    T, E = scores_TE.shape
    k = loads.k
    prices = np.zeros(E + 1)
    if start_E is not None:
        prices[:E] = start_E
    rows = scores_TE.to(torch.float64, copy=True).contiguous().numpy()
    bonus = np.zeros(E, np.int64)
    if loads.bonus:
        order = np.argsort(-prices[:E], kind="stable")
        bonus[order[: loads.bonus]] = 1
        prices[E] = prices[order[loads.bonus - 1]]
    finite = np.abs(rows, where=np.isfinite(rows), out=np.zeros_like(rows))
    scale = float(finite.max(initial=0.0))
    free = loads.base + bonus
    value = np.empty(T * k)
    place = np.empty(T * k, np.int64)
    bad = place_rows(rows, prices, k, scale * 2.0**-46, free, value, place)
    if bad >= 0:
        raise ValueError(f"scores: token {bad} has fewer than k = {k} experts that are not forbidden (-inf)")
    status, paths = rebalance(rows, value, place, k, -free, bonus, loads.bonus, prices)
    if status != BALANCED:
        raise ValueError("scores: the forbidden pairs (-inf) leave no assignment with these loads")
    return place.reshape(T, k), prices[:E]
