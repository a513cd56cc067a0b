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
def best_two(turned_BEJ: Floats, prices: Floats, start: int, stop: int, best_T: I32, margin_T: Floats) -> None:
    """Best expert of each token in blocks start..stop at these prices, and by how much it leads the second best.

    One read of the scores, O(T E), vectorised across the 64 tokens of a block. The margin is inf where no second
    expert is open; the best is -1 where none is.
    """
    T = best_T.shape[0]
    E = turned_BEJ.shape[1]
    top = np.empty(BLOCK, turned_BEJ.dtype)
    runner = np.empty(BLOCK, turned_BEJ.dtype)
    top_at = np.empty(BLOCK, np.int32)
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
        for j in range(min(BLOCK, T - b * BLOCK)):
            best_T[b * BLOCK + j] = top_at[j]
            margin_T[b * BLOCK + j] = top[j] - runner[j]


@kernel
def best_k(scores_TE: Floats, prices: Floats, k: int, start: int, stop: int, chosen_TK: I32, margin_T: Floats) -> None:
    """The k best experts of tokens start..stop, and by how much the last of them leads the one after; O(T E k)."""
    E = scores_TE.shape[1]
    value = np.empty(k + 1, scores_TE.dtype)
    at = np.empty(k + 1, np.int32)
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
        chosen_TK[t] = at[:k]
        margin_T[t] = value[k - 1] - value[k]


@kernel
def place_rows(
    scores_NE: Floats, prices: F64, k: int, slack: float, known_NK: I64, sure_N: NDArray[np.bool_], free: I64,
    value: F64, place: I64,
) -> int:  # fmt: skip
    """Give each row its k best experts in double precision, ties (within `slack`) to the expert with most room left.

    Rows marked `sure` take the experts `known` from a pass in lower precision. `free` [E] is the room before these rows
    are placed and is used up here. Taken entries of `scores_NE` become -inf. Returns -1, or the first row that has
    fewer than k experts open to it. O(N E k).
    """
    N, E = scores_NE.shape
    for r in range(N):
        row = scores_NE[r]
        for i in range(k):
            at = -1
            if sure_N[r]:
                at = known_NK[r, i]
            else:
                best = -np.inf
                for e in range(E):
                    best = max(best, row[e] - prices[e])
                if best == -np.inf:
                    return r
                for e in range(E):
                    if row[e] - prices[e] >= best - slack and (at < 0 or free[e] > free[at]):
                        at = e
            place[r * k + i] = at
            value[r * k + i] = row[at]
            row[at] = -np.inf
            free[at] -= 1
    return -1
