"""The exact assignment of the tokens that may move, while all others keep their choice; and whether they should.

Legend: T tokens, E experts, K experts per token, N tokens that may move.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_base.assignment.kernel import kernel
from lightning_base.assignment.residual import rebalance

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
Bools = NDArray[np.bool_]
Floats = NDArray[np.floating]

NO_EXPERT = 2  # beside the outcomes of `rebalance`


@kernel
def _place(
    rows_NE: Floats, prices: F64, slack: float, known_NK: I64, sure_N: Bools, free: I64, value: F64, place: I64
) -> int:  # fmt: skip
    """Give each row its k best experts in double precision, ties (within `slack`) to the expert with most room left.

    Rows marked `sure` take the experts `known` from a pass in lower precision. `free` [E] is the room before these rows
    are placed and is used up here. Taken entries of `rows_NE` become -inf. Returns -1, or the first row that has
    fewer than k experts open to it. O(N E k).
    """
    N, E = rows_NE.shape
    k = known_NK.shape[1]
    for r in range(N):
        row = rows_NE[r]
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


@kernel
def assign_movable(
    scores_TE: Floats, chosen_TK: I32, margin_T: Floats, rounding: float, movable_T: Bools, free: I64, num_bonus: int,
    enough: int, prices: F64, expert_TK: I64,
) -> tuple[int, int]:  # fmt: skip
    """Optimal experts of the tokens that may move, and prices [E + 1] (the last is that of a bonus place), in place.

    `free` [E] is the whole places of each expert and is used up. Stops when `enough` tokens are left over. Returns
    (BALANCED, UNREACHABLE or NO_EXPERT, the number of paths or the token that has no expert).
    """
    T, E = scores_TE.shape
    k = chosen_TK.shape[1]
    bonus = np.zeros(E, np.int64)
    for _ in range(num_bonus):  # the dearest experts; `free` stays what it is for sure, the places themselves
        dearest = -1
        for e in range(E):
            if bonus[e] == 0 and (dearest < 0 or prices[e] > prices[dearest]):
                dearest = e
        bonus[dearest] = 1
        free[dearest] += 1
        prices[E] = prices[dearest]
    N = 0
    for t in range(T):
        N += 1 if movable_T[t] else 0
    index = np.empty(N, np.int64)
    rows_NE = np.empty((N, E), scores_TE.dtype)
    known_NK = np.empty((N, k), np.int64)
    sure_N = np.empty(N, np.bool_)
    slack = 0.0
    for e in range(E):
        slack = max(slack, 2.0**-46 * abs(prices[e]))
    r = 0
    for t in range(T):
        for i in range(k):
            expert_TK[t, i] = chosen_TK[t, i]
        if movable_T[t]:
            index[r] = t
            rows_NE[r] = scores_TE[t]
            known_NK[r] = expert_TK[t]
            sure_N[r] = margin_T[t] > max(rounding, slack)
            r += 1
        else:
            for i in range(k):
                free[chosen_TK[t, i]] -= 1
    value = np.empty(N * k)
    place = np.empty(N * k, np.int64)
    bad = _place(rows_NE, prices, slack, known_NK, sure_N, free, value, place)
    if bad >= 0:
        return NO_EXPERT, index[bad]
    status, paths = rebalance(rows_NE, value, place, k, -free, bonus, num_bonus, enough, prices)
    for r in range(N):
        for i in range(k):
            expert_TK[index[r], i] = place[r * k + i]
    return status, paths


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
    change = after - before
    least = np.inf
    for e in range(E):
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
