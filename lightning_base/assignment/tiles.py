"""Columns of the residual graph found quickly: the scores of an expert's slots, copied with experts first.

When the cheapest move from e to f has been made, the next one is sought among all slots of e. Their rows lie apart, so
that reading one column of them is slow. A tile has that column in one piece. It is laid out when first needed; slots
that leave are struck out in it, and those that came since stand at the head of the expert's list, before all others.

Legend: N rows of scores, E experts, S slots (see `moves`), P places in tiles.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_base.assignment.kernel import kernel
from lightning_base.assignment.moves import STALE, cheapest_moves

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Floats = NDArray[np.floating]

MAGNITUDE = np.int64(0x7FFFFFFFFFFFFFFF)  # all bits of a double but the sign
WORTH_IT = 32  # slots, up to which reading all rows anew is quickest


@kernel
def room_for_tiles(place: I64, weight: I64, slots: int, excess: I64) -> I64:
    """Where the tile of each expert starts, [E + 1]: no expert ever holds more than it does now or may in the end."""
    E = excess.shape[0]
    start = np.zeros(E + 1, np.int64)
    for slot in range(slots):
        start[place[slot] + 1] += weight[slot]  # a slot may be split into as many
    for e in range(E):
        start[e + 1] += start[e] + max(0, -excess[e]) + 1
    return start


@kernel
def _lay(
    e: int, open_NE: Floats, row: I64, value: F64, head: I64, after: I64, start: I64, tile: Floats, filled: I64,
    held: F64, held_by: I64, tiled: I64,
) -> None:  # fmt: skip
    """Copy the rows of all slots of e into its tile, column by column."""
    n = 0
    slot = head[e]
    while slot >= 0:
        at = start[e] + n
        tiled[slot] = at
        held[at] = value[slot]
        held_by[at] = slot
        n += 1
        slot = after[slot]
    filled[e] = n
    E = open_NE.shape[1]
    columns = tile[start[e] * E : start[e] * E + n * E].reshape(E, n)
    for j in range(n):
        scores = open_NE[row[held_by[start[e] + j]]]
        for f in range(E):
            columns[f, j] = scores[f]


@kernel
def _least(held: F64, column: Floats, loss: F64, bits: I64) -> int:
    """Which place of a tile loses the least in one column, the first of equals.

    `loss` and `bits` are the same scratch memory. Doubles as integers are in the same order but for the negative ones,
    which are turned round; a minimum of integers vectorises, that of floats does not.
    """
    n = column.shape[0]
    for j in range(n):
        loss[j] = held[j] - column[j]
    least = bits[0] ^ ((bits[0] >> 63) & MAGNITUDE)
    for j in range(1, n):
        key = bits[j] ^ ((bits[j] >> 63) & MAGNITUDE)
        least = min(least, key)
    least ^= (least >> 63) & MAGNITUDE
    j = 0
    while bits[j] != least:
        j += 1
    return j


@kernel
def refresh(
    e: int, k: int, open_NE: Floats, row: I64, value: F64, head: I64, after: I64, start: I64, tile: Floats, filled: I64,
    held: F64, held_by: I64, tiled: I64, scratch: F64, loss_EE: F64, via_EE: I64, stale: I64,
) -> None:  # fmt: skip
    """Recompute the stale entries of row e: the columns whose cheapest token has left, or all if that is quicker."""
    E = open_NE.shape[1]
    via = via_EE[e]
    columns = 0
    for g in range(E):
        columns += 1 if via[g] == STALE else 0
    stale[e] = 0
    if columns == 0 and k == 1:
        return
    new = 0
    slot = head[e]
    while slot >= 0 and tiled[slot] < 0:
        new += 1
        slot = after[slot]
    n = filled[e]
    if k > 1 or new + n <= max(WORTH_IT, 2 * columns):  # with k > 1 scores are crossed out, which tiles would not know
        cheapest_moves(e, open_NE, row, value, head, after, loss_EE, via_EE)
        return
    if n == 0 or 4 * new > 32 + n:
        _lay(e, open_NE, row, value, head, after, start, tile, filled, held, held_by, tiled)
        n = filled[e]
    mine = held[start[e] : start[e] + n]
    bits = scratch.view(np.int64)
    for g in range(E):
        if via[g] == STALE:
            j = _least(mine, tile[start[e] * E + g * n : start[e] * E + (g + 1) * n], scratch, bits)
            least = scratch[j]
            at = held_by[start[e] + j] if least < np.inf else -1
            slot = head[e]
            while slot >= 0 and tiled[slot] < 0:
                d = value[slot] - open_NE[row[slot], g]
                if d < least:
                    least = d
                    at = slot
                slot = after[slot]
            loss_EE[e, g] = least
            via[g] = at
