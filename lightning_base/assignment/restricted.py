"""The exact assignment of the tokens that may move, while all others keep their choice; and whether they should.

Legend: T tokens, E experts, K experts per token, N rows of tokens that may move.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_base.assignment.kernel import kernel
from lightning_base.assignment.passes import smallest
from lightning_base.assignment.residual import rebalance

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
Bools = NDArray[np.bool_]
Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

NO_EXPERT = 2  # beside the outcomes of `rebalance`
SPARE = 8  # tokens that may leave an expert beyond those that must


@kernel
def _place(row: Floats, prices: F64, slack: float, free: I64) -> int:
    """The best expert of one row in double precision, ties (within `slack`) to the one with most room; -1 if none."""
    best = -np.inf
    for e in range(row.shape[0]):
        best = max(best, row[e] - prices[e])
    at = -1
    if best > -np.inf:
        for e in range(row.shape[0]):
            if row[e] - prices[e] >= best - slack and (at < 0 or free[e] > free[at]):
                at = e
    return at


@kernel
def _hand_out_bonus(num_bonus: int, prices: F64, free: I64) -> I64:
    """Give the bonus places to the dearest experts; the price of a bonus place is that of the cheapest of them."""
    E = free.shape[0]
    bonus = np.zeros(E, np.int64)
    for _ in range(num_bonus):
        dearest = -1
        for e in range(E):
            if bonus[e] == 0 and (dearest < 0 or prices[e] > prices[dearest]):
                dearest = e
        bonus[dearest] = 1
        free[dearest] += 1
        prices[E] = prices[dearest]
    return bonus


@kernel
def assign_movable(
    scores_TE: Floats, chosen_TK: I32, margin_T: Floats, key_T: Ints, rounding: float, movable_T: Bools, free: I64,
    num_bonus: int, prices: F64, expert_TK: I64,
) -> tuple[int, int]:  # fmt: skip
    """Optimal experts of the tokens that may move, and prices [E + 1] (the last is that of a bonus place), in place.

    `chosen` and `margin` come from a pass at these prices that is certain where the margin is above `rounding`; `key`
    is equal for equal rows. `free` [E] is the places of each expert without bonus, and is used up. Returns (BALANCED,
    UNREACHABLE or NO_EXPERT, the number of paths or the token that has no expert).
    """
    T, E = scores_TE.shape
    k = chosen_TK.shape[1]
    bonus = _hand_out_bonus(num_bonus, prices, free)
    slack = 0.0
    for e in range(E):
        slack = max(slack, 2.0**-46 * abs(prices[e]))
    N = 0
    for t in range(T):
        for i in range(k):
            expert_TK[t, i] = chosen_TK[t, i]
            if not movable_T[t]:
                free[chosen_TK[t, i]] -= 1
        N += 1 if movable_T[t] else 0
    index = np.empty(N, np.int64)
    open_NE = scores_TE if k == 1 else np.empty((N, E), scores_TE.dtype)  # with k > 1 taken pairs are crossed out
    key = np.empty(N * k, np.int64)
    row = np.empty(N * k, np.int64)
    value = np.empty(N * k)
    place = np.empty(N * k, np.int64)
    slot = 0
    for t in range(T):
        if movable_T[t]:
            r = t if k == 1 else slot // k
            if k > 1:
                open_NE[r] = scores_TE[t]
            sure = margin_T[t] > max(rounding, slack)
            index[slot // k] = t
            for i in range(k):
                at = np.int64(chosen_TK[t, i]) if sure else _place(open_NE[r], prices, slack, free)
                if at < 0:
                    return NO_EXPERT, t
                key[slot] = key_T[t]
                row[slot] = r
                value[slot] = open_NE[r, at]
                place[slot] = at
                free[at] -= 1
                slot += 1
                if k > 1:
                    open_NE[r, at] = -np.inf
    status, paths = rebalance(open_NE, key, row, value, place, k, -free, bonus, num_bonus, prices)
    for slot in range(N * k):
        expert_TK[index[slot // k], slot % k] = place[slot]
    return status, paths


@kernel
def choose_movable(
    chosen_TK: I32, margin_T: Floats, threshold: float, load_E: I64, largest_E: I64, movable_T: Bools
) -> None:  # fmt: skip
    """Mark the tokens that may move: all with a margin up to the threshold, and enough in every expert; O(T).

    Enough are those that are too many and `SPARE` more, so that no expert is a dead end. They are the ones with the
    smallest margins among the tokens of the expert.
    """
    T, k = chosen_TK.shape
    E = load_E.shape[0]
    lacking = np.empty(E, np.int64)
    for e in range(E):
        lacking[e] = max(load_E[e] - largest_E[e], 0) + SPARE
    for t in range(T):
        movable_T[t] = movable_T[t] or margin_T[t] <= threshold
        if movable_T[t]:
            for i in range(k):
                lacking[chosen_TK[t, i]] -= 1
    start = np.zeros(E + 1, np.int64)
    for e in range(E):
        start[e + 1] = start[e] + (load_E[e] if lacking[e] > 0 else 0)
    if start[E] == 0:
        return
    end = start[:-1].copy()
    held = np.empty(start[E], margin_T.dtype)
    for t in range(T):
        for i in range(k):
            e = chosen_TK[t, i]
            if lacking[e] > 0 and not movable_T[t]:
                held[end[e]] = margin_T[t]
                end[e] += 1
    limit = np.full(E, -np.inf)
    for e in range(E):
        if lacking[e] > 0 and end[e] > start[e]:
            limit[e] = smallest(held[start[e] : end[e]], min(lacking[e], end[e] - start[e]) - 1)
    for t in range(T):
        for i in range(k):
            movable_T[t] = movable_T[t] or margin_T[t] <= limit[chosen_TK[t, i]]


@kernel
def free_unhappy(
    scores_TE: Floats, expert_TK: I64, margin_T: Floats, rounding: float, before: F64, after: F64, movable_T: Bools
) -> int:  # fmt: skip
    """Let held tokens move whose experts are no longer their best at the new prices, in double precision; how many.

    A margin shrinks by at most the rise of the token's own dearest expert less the least rise of any other, so few
    tokens need a look: O(E) each.
    """
    T, E = scores_TE.shape
    k = expert_TK.shape[1]
    change = np.empty(E)
    least = np.inf
    for e in range(E):
        change[e] = after[e] - before[e]
        least = min(least, change[e])
    unhappy = 0
    for t in range(T):
        rise = -np.inf
        for i in range(k):
            rise = max(rise, change[expert_TK[t, i]])
        if movable_T[t] or margin_T[t] > rise - least + rounding:
            continue
        own = np.inf
        for i in range(k):
            e = expert_TK[t, i]
            own = min(own, scores_TE[t, e] - after[e])
        for e in range(E):
            if scores_TE[t, e] - after[e] > own:
                mine = False
                for i in range(k):
                    mine = mine or expert_TK[t, i] == e
                if not mine:
                    movable_T[t] = True
                    unhappy += 1
                    break
    return unhappy
