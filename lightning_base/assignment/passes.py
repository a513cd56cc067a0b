"""Passes over all scores: each token's best choices at given prices, in the precision of the scores.

Legend: T tokens, E experts.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_base.assignment.kernel import kernel

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
Floats = NDArray[np.floating]

BLOCK = 64  # tokens side by side: their running maxima stay in registers


@kernel
def turn(scores_TE: Floats, start: int, stop: int, turned_BEJ: Floats) -> None:
    """Copy blocks start..stop of 64 tokens with experts first, [blocks, E, 64]; O(T E), once per problem."""
    T, E = scores_TE.shape
    for b in range(start, stop):
        for j in range(min(BLOCK, T - b * BLOCK)):
            for e in range(E):
                turned_BEJ[b, e, j] = scores_TE[b * BLOCK + j, e]


@kernel
def best_two(
    turned_BEJ: Floats, prices: Floats, start: int, stop: int, best_T: I32, margin_T: Floats, load_E: I64
) -> float:  # fmt: skip
    """Best expert of each token in blocks start..stop at these prices, and by how much it leads the second best.

    One read of the scores, O(T E), vectorised across the 64 tokens of a block. The margin is inf where no second
    expert is open; the best is -1 where none is. Adds the tokens to `load` and returns the largest |s - p| of a best.
    """
    E = turned_BEJ.shape[1]
    top = np.empty(BLOCK, turned_BEJ.dtype)
    runner = np.empty(BLOCK, turned_BEJ.dtype)
    top_at = np.empty(BLOCK, np.int32)
    high = np.zeros(BLOCK, turned_BEJ.dtype)
    for b in range(start, stop):
        for j in range(BLOCK):
            top[j] = -np.inf
            runner[j] = -np.inf
            top_at[j] = -1
        for e in range(E):
            row = turned_BEJ[b, e]
            p = prices[e]
            for j in range(BLOCK):
                x = row[j] - p
                wins = x > top[j]
                places = x > runner[j]
                runner[j] = top[j] if wins else (x if places else runner[j])
                top_at[j] = np.int32(e) if wins else top_at[j]
                top[j] = x if wins else top[j]
        best = best_T[b * BLOCK : (b + 1) * BLOCK]  # all of these loops but the one of the load vectorise
        margin = margin_T[b * BLOCK : (b + 1) * BLOCK]
        for j in range(best.shape[0]):
            best[j] = top_at[j]
            margin[j] = top[j] - runner[j]
        for j in range(best.shape[0]):
            x = abs(top[j])
            high[j] = x if x > high[j] and x < np.inf else high[j]
        for j in range(best.shape[0]):
            if top_at[j] >= 0:
                load_E[top_at[j]] += 1
    largest = 0.0
    for j in range(BLOCK):
        largest = max(largest, high[j])
    return largest


@kernel
def best_k(
    scores_TE: Floats, prices: Floats, start: int, stop: int, chosen_TK: I32, margin_T: Floats, load_E: I64
) -> float:  # fmt: skip
    """The k best experts of tokens start..stop, and by how much the last of them leads the one after; O(T E k).

    Adds the tokens to `load` and returns the largest |s - p| of a chosen pair.
    """
    E = scores_TE.shape[1]
    k = chosen_TK.shape[1]
    value = np.empty(k + 1, scores_TE.dtype)
    at = np.empty(k + 1, np.int32)
    largest = 0.0
    for t in range(start, stop):
        value[:] = -np.inf
        at[:] = -1
        for e in range(E):
            x = scores_TE[t, e] - prices[e]
            if x > value[k]:
                j = k
                while j > 0 and x > value[j - 1]:
                    value[j] = value[j - 1]
                    at[j] = at[j - 1]
                    j -= 1
                value[j] = x
                at[j] = e
        margin_T[t] = value[k - 1] - value[k]
        for i in range(k):
            chosen_TK[t, i] = at[i]
            if at[i] >= 0:
                load_E[at[i]] += 1
                largest = max(largest, abs(value[i]))
    return largest


@kernel
def smallest(values: Floats, rank: int) -> float:
    """The entry with this many smaller ones, by quickselect; reorders `values`.

    Numba has sorts of its own, but loading them takes longer than all other kernels together.
    """
    low, high = 0, values.shape[0] - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if rank <= j:
            high = j
        elif rank >= i:
            low = i
        else:
            break
    return values[rank]


@kernel
def typical_margin(margin_T: Floats) -> float:
    """The mean over the tokens with a second expert, or a high quantile where few large margins lift the mean above it.

    The quantile is that of some thousand tokens. 0 if no token has a second expert.
    """
    total = 0.0
    count = 0
    for t in range(margin_T.shape[0]):
        if margin_T[t] < np.inf:
            total += margin_T[t]
            count += 1
    mean = total / max(count, 1)
    every = max(1, margin_T.shape[0] // 1024)
    some = margin_T[::every].copy()
    high = np.float64(smallest(some, some.shape[0] * 6 // 10))
    return min(mean, high) if high > 0.0 else mean


@kernel
def too_many(load_E: I64, largest_E: I64) -> int:
    """How many tokens are beyond what their experts may hold."""
    count = 0
    for e in range(load_E.shape[0]):
        count += max(load_E[e] - largest_E[e], 0)
    return count
