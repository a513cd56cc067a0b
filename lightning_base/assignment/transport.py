"""The exact solver: balanced assignment as a transportation problem with one price per expert.

Legend: T tokens, E experts, N tokens that may still move.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_base.assignment.kernel import announce_compilation
from lightning_base.assignment.passes import best_k, best_two, place_rows
from lightning_base.assignment.prices import newton_step
from lightning_base.assignment.problem import Loads
from lightning_base.assignment.residual import BALANCED, rebalance

Floats = NDArray[np.floating]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

SAMPLE = 8  # every eighth token prices the experts for all
SMALL = 2**14  # up to so many scores there is nothing to gain from a sample or from holding tokens fixed
NEWTON = (0.5, 0.25, 0.12)  # smoothing of the Newton steps, in mean margins
PARALLEL = 2**21  # from so many scores on, a pass is worth several threads


def solve_transport(scores_TE: Floats, loads: Loads, start_E: F64 | None) -> tuple[NDArray[np.int64], F64]:
    """Exact assignment [T, k] and prices [E] of C-contiguous scores without NaN or +inf, every capacity at least one.

    1. Prices: given, or those of every eighth token, solved the same way; then up to `len(NEWTON)` Newton steps on all.
    2. Every token to its best experts at these prices. Those with a small margin may still move; the others are held.
    3. Successive shortest paths among those who may move.
    4. If some held token would now rather be elsewhere, it may move too, and 2 and 3 are repeated at the new prices.

    Bound: the recursion has log_8 T levels; step 4 repeats at most 3 times, the last time with every token free to
    move, when no check is needed; the steps within are bounded in their own docstrings.

    Raises ValueError if the forbidden pairs (-inf) leave no assignment.
    """
    announce_compilation(rebalance)
    prices = np.zeros(scores_TE.shape[1]) if start_E is None else start_E.copy()
    expert, prices, balanced = _solve(scores_TE, loads, prices, cold=start_E is None)
    if not balanced:
        raise ValueError("scores: the forbidden pairs (-inf) leave no assignment with these loads")
    return expert, prices


def _solve(scores_TE: Floats, loads: Loads, prices: F64, cold: bool) -> tuple[I64, F64, bool]:
    T, E = scores_TE.shape
    if T * E <= SMALL:
        return _exact(scores_TE, loads, prices, np.zeros((T, loads.k), np.int64), np.arange(T))
    if cold:
        sample = np.ascontiguousarray(scores_TE[::SAMPLE])
        _, prices, _ = _solve(sample, _sample_loads(loads, len(sample), T), prices, cold=True)
    chosen_TK, margin_T = _choose(scores_TE, prices, loads.k)
    if loads.k == 1:
        scale = float(margin_T.mean(where=np.isfinite(margin_T), dtype=np.float64)) if T else 0.0
        for factor in NEWTON:
            over = newton_step(scores_TE, chosen_TK[:, 0], margin_T, loads.target, max(scale * factor, 1e-30), prices)
            chosen_TK, margin_T = _choose(scores_TE, prices, loads.k)
    wanted = max(T // 4, 4 * E)
    may_move = np.zeros(T, bool)
    precision = 8 * np.finfo(scores_TE.dtype).eps
    for last in (False, False, True):
        if last or wanted >= T:
            may_move[:] = True
        else:
            threshold = np.partition(margin_T, wanted)[wanted]
            may_move |= margin_T <= max(threshold, precision * (np.abs(prices).max() + 1))
        index = np.flatnonzero(may_move)
        expert, new_prices, balanced = _exact(scores_TE, loads, prices, chosen_TK.astype(np.int64), index)
        if len(index) == T:
            return expert, new_prices, balanced
        if balanced:
            held = ~may_move
            change = new_prices - prices
            unsure = np.flatnonzero(held & (margin_T <= change[chosen_TK].max(1) - change.min()))
            if len(unsure) == 0:
                return expert, new_prices, True
            rows = scores_TE[unsure].astype(np.float64) - new_prices
            mine = np.take_along_axis(rows, expert[unsure], 1).min(1)
            np.put_along_axis(rows, expert[unsure], -np.inf, 1)
            wrong = unsure[mine < rows.max(1)]
            if len(wrong) == 0:
                return expert, new_prices, True
            may_move[wrong] = True
            prices = new_prices
            chosen_TK, margin_T = _choose(scores_TE, prices, loads.k)
        wanted *= 4
    raise AssertionError("the last round frees every token")


def _sample_loads(loads: Loads, num_sampled: int, num_tokens: int) -> Loads:
    """The same shares for a sample of the tokens, rounded to whole tokens by largest remainder."""
    exact = loads.target * (num_sampled / num_tokens)
    base = np.floor(exact + 1e-9).astype(np.int64)
    short = num_sampled * loads.k - int(base.sum())
    base[np.argsort(base - exact, kind="stable")[:short]] += 1
    return Loads(base, 0, loads.k)


def _exact(scores_TE: Floats, loads: Loads, prices: F64, chosen_TK: I64, index: I64) -> tuple[I64, F64, bool]:
    """Exact assignment when only the tokens in `index` may move and all others keep `chosen_TK`."""
    T, E = scores_TE.shape
    k = loads.k
    bonus = np.zeros(E, np.int64)
    extended = np.append(prices, 0.0)
    if loads.bonus:
        order = np.argsort(-prices, kind="stable")
        bonus[order[: loads.bonus]] = 1
        extended[E] = prices[order[loads.bonus - 1]]
    rows_NE = scores_TE[index].astype(np.float64)
    free = loads.base + bonus
    if len(index) < T:
        held = np.ones(T, bool)
        held[index] = False
        free -= np.bincount(chosen_TK[held].ravel(), minlength=E)
    value = np.empty(len(index) * k)
    place = np.empty(len(index) * k, np.int64)
    slack = 2.0**-46 * float(np.abs(prices).max())
    bad = place_rows(rows_NE, extended, k, slack, free, value, place)
    if bad >= 0:
        raise ValueError(f"scores: token {index[bad]} has fewer than k = {k} experts that are not forbidden (-inf)")
    status, _paths = rebalance(rows_NE, value, place, k, -free, bonus, loads.bonus, extended)
    expert = chosen_TK.copy()
    expert[index] = place.reshape(-1, k)
    return expert, extended[:E], status == BALANCED


def _choose(scores_TE: Floats, prices: F64, k: int) -> tuple[NDArray[np.int32], Floats]:
    """Best k experts [T, k] and margins [T] at these prices: one pass, by several threads where that pays.

    Tokens are independent of each other, so the number of threads changes nothing.
    """
    T, E = scores_TE.shape
    chosen = np.empty((T, k), np.int32)
    margin = np.empty(T, scores_TE.dtype)
    rounded = prices.astype(scores_TE.dtype)

    def part(start: int, stop: int) -> None:
        if k == 1:
            best_two(scores_TE, rounded, start, stop, chosen[:, 0], margin)
        else:
            best_k(scores_TE, rounded, k, start, stop, chosen, margin)

    threads = torch.get_num_threads() if T * E >= PARALLEL else 1
    if threads == 1:
        part(0, T)
    else:
        edges = np.linspace(0, T, threads + 1).astype(int)
        list(_pool(os.getpid(), threads).map(part, edges[:-1], edges[1:]))
    return chosen, margin


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Kept between calls; one per process, since threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="balanced-assignment")
