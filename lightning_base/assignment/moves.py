"""The residual graph on E nodes: the cheapest token to move from each expert to each other, kept up to date.

Legend: N rows of scores, E experts, S slots. A slot is a token in an expert, or several tokens with equal scores in the
same expert: it has a row of `open_NE`, the score `value` it earns, a `weight` (how many tokens) and a place in the
list of its expert (`head`, `after`, `before`). Its tokens are chained from `first` through `other`. `open_NE[r, e]` is
what row r would earn in expert e; with k > 1, -inf where another slot of the same token sits.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_base.assignment.kernel import kernel

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Floats = NDArray[np.floating]  # scores stay as they came; every sum and difference is in double precision

STALE = -2  # a residual edge whose cheapest token has just left
PROBES = 8  # hash places looked at for an equal row before it counts as a new one


@kernel
def link(slot: int, expert: int, head: I64, after: I64, before: I64) -> None:
    first = head[expert]
    after[slot] = first
    before[slot] = -1
    if first >= 0:
        before[first] = slot
    head[expert] = slot


@kernel
def _unlink(slot: int, expert: int, head: I64, after: I64, before: I64) -> None:
    if before[slot] >= 0:
        after[before[slot]] = after[slot]
    else:
        head[expert] = after[slot]
    if after[slot] >= 0:
        before[after[slot]] = before[slot]


@kernel
def merge_equal(
    open_NE: Floats, key: I64, row: I64, value: F64, place: I64, weight: I64, first: I64, other: I64
) -> int:  # fmt: skip
    """Make one slot of slots with equal scores and the same expert; returns how many are left, at the front.

    `key` is equal for equal rows and mostly differs otherwise. Rows are compared before they are merged, and one that
    finds no equal after a few tries stays alone, so keys decide the speed only.
    """
    S = row.shape[0]
    size = 1
    while size < 2 * S:
        size *= 2
    table = np.full(size, -1, np.int64)
    used = 0
    for i in range(S):
        h = (key[i] * 0x9E3779B1 + place[i] * 0x85EBCA6B) & 0x7FFFFFFFFFFFFFFF
        at = (h ^ (h >> 17)) & (size - 1)
        same = -1
        for _ in range(PROBES):
            slot = table[at]
            if slot < 0:
                break
            if place[slot] == place[i] and _equal(open_NE[row[slot]], open_NE[row[i]]):
                same = slot
                break
            at = (at + 1) & (size - 1)
        if same >= 0:
            weight[same] += 1
            other[i] = first[same]
            first[same] = i
        else:
            row[used], value[used], place[used] = row[i], value[i], place[i]
            weight[used], first[used], other[i] = 1, i, -1
            if table[at] < 0:
                table[at] = used
            used += 1
    return used


@kernel
def _equal(left: Floats, right: Floats) -> bool:
    if left[0] != right[0]:
        return False
    different = 0
    for e in range(left.shape[0]):
        different += 1 if left[e] != right[e] else 0
    return different == 0


@kernel
def _offer(slot: int, row: Floats, earned: float, loss: F64, via: I64) -> None:
    """Enter one slot into the row of the residual graph that belongs to its expert. Branch-free, so it vectorises."""
    for f in range(row.shape[0]):
        d = earned - row[f]
        less = d < loss[f]
        loss[f] = d if less else loss[f]
        via[f] = slot if less else via[f]


@kernel
def cheapest_moves(
    e: int, open_NE: Floats, row: I64, value: F64, head: I64, after: I64, loss_EE: F64, via_EE: I64
) -> None:  # fmt: skip
    """Row e of the residual graph: the least loss of moving one token from e to each other expert, and which slot."""
    loss = loss_EE[e]
    via = via_EE[e]
    for f in range(open_NE.shape[1]):
        loss[f] = np.inf
        via[f] = -1
    loss[e] = -np.inf  # no offer beats it, so this entry never needs a refresh
    slot = head[e]
    while slot >= 0:
        _offer(slot, open_NE[row[slot]], value[slot], loss, via)
        slot = after[slot]


@kernel
def tied(
    e: int, f: int, limit: int, open_NE: Floats, row: I64, value: F64, weight: I64, head: I64, after: I64, loss: float
) -> int:  # fmt: skip
    """How many tokens of e (at most `limit`) move to f at exactly the least loss."""
    count = 0
    slot = head[e]
    while slot >= 0 and count < limit:
        if value[slot] - open_NE[row[slot], f] == loss:
            count += weight[slot]
        slot = after[slot]
    return min(count, limit)


@kernel
def _split(
    slot: int, count: int, row: I64, value: F64, place: I64, weight: I64, first: I64, other: I64, used: I64
) -> int:  # fmt: skip
    """Take `count` tokens out of a slot into a new one, which is in no list yet."""
    new = used[0]  # slots have at least one token each, so there is always one left
    used[0] += 1
    row[new], value[new], place[new], weight[new] = row[slot], value[slot], place[slot], count
    first[new] = first[slot]
    last = first[slot]
    for _ in range(count - 1):
        last = other[last]
    first[slot] = other[last]
    other[last] = -1
    weight[slot] -= count
    return new


@kernel
def move(
    e: int, f: int, k: int, count: int, open_NE: Floats, row: I64, value: F64, place: I64, weight: I64, first: I64,
    other: I64, used: I64, head: I64, after: I64, before: I64, tiled: I64, held: F64, loss_EE: F64, via_EE: I64,
    stale: I64,
) -> None:  # fmt: skip
    """Move `count` tokens that lose the least from e to f, and mark what this makes stale in the residual graph."""
    E = open_NE.shape[1]
    loss = loss_EE[e, f]
    alone = weight[via_EE[e, f]] >= count  # then no other slot is looked for
    slot = via_EE[e, f] if alone else head[e]
    while slot >= 0 and count > 0:
        following = after[slot]
        if value[slot] - open_NE[row[slot], f] == loss:
            going = slot
            if weight[slot] > count:
                going = _split(slot, count, row, value, place, weight, first, other, used)
            else:
                _unlink(slot, e, head, after, before)
                if tiled[slot] >= 0:
                    held[tiled[slot]] = np.inf
                left = via_EE[e]
                for g in range(E):
                    left[g] = STALE if left[g] == slot else left[g]
                stale[e] = 1
            count -= weight[going]
            link(going, f, head, after, before)
            tiled[going] = -1
            r = row[going]
            earned = np.float64(open_NE[r, f])
            if k > 1:  # the token's other slots may now move to e and no longer to f
                open_NE[r, e] = value[going]
                open_NE[r, f] = -np.inf
            value[going] = earned
            place[going] = f
            if k > 1:
                for sibling in range(r * k, r * k + k):
                    stale[place[sibling]] = 2
            _offer(going, open_NE[r], earned, loss_EE[f], via_EE[f])
        slot = following
