"""Passes over all scores in float32: the layout with experts first, and each token's best choice at given prices.

Legend: T tokens, E experts. In `scores_ET` the tokens of one expert are contiguous, so that LLVM vectorises the
comparison of experts across tokens.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_base.assignment.kernel import kernel

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

BLOCK = 512  # tokens whose running best and second best stay in the first-level cache


@kernel
def best_two(scores_ET: F32, prices: F32, start: int, stop: int, best_T: I32, second_T: I32, margin_T: F32) -> None:
    """Best and second-best expert of tokens start..stop at these prices, and by how much the best leads.

    One read of the scores; O(T E). With one expert the margin is inf and the second choice is -1.
    """
    E = scores_ET.shape[0]
    top = np.empty(BLOCK, np.float32)
    runner = np.empty(BLOCK, np.float32)
    top_at = np.empty(BLOCK, np.int32)
    runner_at = np.empty(BLOCK, np.int32)
    for low in range(start, stop, BLOCK):
        n = min(BLOCK, stop - low)
        for j in range(n):
            top[j] = -np.inf
            runner[j] = -np.inf
            top_at[j] = -1
            runner_at[j] = -1
        for e in range(E):
            row = scores_ET[e, low : low + n]
            p = prices[e]
            for j in range(n):
                x = row[j] - p
                wins = x > top[j]
                places = x > runner[j]
                runner_at[j] = top_at[j] if wins else (np.int32(e) if places else runner_at[j])
                runner[j] = top[j] if wins else (x if places else runner[j])
                top_at[j] = np.int32(e) if wins else top_at[j]
                top[j] = x if wins else top[j]
        for j in range(n):
            best_T[low + j] = top_at[j]
            second_T[low + j] = runner_at[j]
            margin_T[low + j] = top[j] - runner[j] if runner_at[j] >= 0 else np.float32(np.inf)


@kernel
def best_k(
    scores_ET: F32, prices: F32, k: int, start: int, stop: int, chosen_TK: I32, next_T: I32, margin_T: F32
) -> None:
    """The k best experts of tokens start..stop, the one after them, and the gap between the last two; O(T E k)."""
    E = scores_ET.shape[0]
    value = np.empty(k + 1, np.float32)
    at = np.empty(k + 1, np.int32)
    for t in range(start, stop):
        value[:] = -np.inf
        at[:] = -1
        for e in range(E):
            x = scores_ET[e, t] - prices[e]
            if x > value[k]:
                j = k
                while j > 0 and x > value[j - 1]:
                    value[j] = value[j - 1]
                    at[j] = at[j - 1]
                    j -= 1
                value[j] = x
                at[j] = e
        chosen_TK[t] = at[:k]
        next_T[t] = at[k]
        margin_T[t] = value[k - 1] - value[k] if at[k] >= 0 else np.float32(np.inf)


@kernel
def place_rows(scores_NE: NDArray[np.float64], prices: NDArray[np.float64], k: int, slack: float, free: NDArray[np.int64],
               value: NDArray[np.float64], place: NDArray[np.int64]) -> int:  # fmt: skip
    """Give each row its k best experts in double precision, ties (within `slack`) to the expert with most room left.

    `free` [E] is the room before these rows are placed and is used up here. Taken entries of `scores_NE` become -inf.
    Returns -1, or the first row that has fewer than k experts open to it. O(N E k).
    """
    N, E = scores_NE.shape
    for r in range(N):
        row = scores_NE[r]
        for i in range(k):
            best = -np.inf
            for e in range(E):
                best = max(best, row[e] - prices[e])
            if best == -np.inf:
                return r
            at = -1
            for e in range(E):
                if row[e] - prices[e] >= best - slack and (at < 0 or free[e] > free[at]):
                    at = e
            place[r * k + i] = at
            value[r * k + i] = row[at]
            row[at] = -np.inf
            free[at] -= 1
    return -1
