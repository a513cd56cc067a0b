"""Successive shortest paths on the E-node residual graph: the step that makes the answer exact.

Legend: N rows of scores, E experts, S slots (see `moves`).
"""

import numpy as np
from numpy.typing import NDArray

from lightning_base.assignment.kernel import kernel
from lightning_base.assignment.moves import STALE, cheapest_moves, link, merge_equal, move, tied
from lightning_base.assignment.tiles import refresh, room_for_tiles

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
Floats = NDArray[np.floating]

BALANCED, UNREACHABLE = 0, 1
INFINITY = np.uint64(0x7FF0000000000000)  # its bits in double precision
SHARE = 4  # Dijkstra goes on until one in so many of the experts with too many tokens is served


@kernel
def _relax(base: float, u: int, loss: F64, price: float, prices: F64, dist: F64, parent: I64) -> None:
    """Shorten the distance of every expert that is nearer through u. Branch-free, so it vectorises."""
    for f in range(loss.shape[0]):
        reduced = loss[f] - price + prices[f]
        # Rounding can leave a reduced cost a few ulps below zero; Dijkstra needs it at zero.
        d = base + (reduced if reduced > 0.0 else 0.0)
        nearer = d < dist[f]
        dist[f] = d if nearer else dist[f]
        parent[f] = u if nearer else parent[f]


@kernel
def _nearest(bits: U64) -> int:
    """Index of the least distance of a node that is not settled, -1 if none can be reached.

    `bits` are the distances as unsigned integers: in the same order, but with those of settled nodes (-inf) last. A
    minimum of integers vectorises, that of floats does not.
    """
    least = bits[0]
    for u in range(1, bits.shape[0]):
        least = min(least, bits[u])
    if least >= INFINITY:
        return -1
    u = 0
    while bits[u] != least:
        u += 1
    return u


@kernel
def _shortest_paths(
    excess: I64, loss_EE: F64, prices: F64, bonus: I64, num_bonus: int, most: int,
    dist: F64, bits: U64, settled: F64, parent: I64, sinks: I64, used: I64,
) -> int:  # fmt: skip
    """Dijkstra with reduced costs from all experts with too many tokens to up to `most` with too few; raises prices.

    At the new prices every edge on the paths found costs nothing. No two of them share an edge, so all may be used as
    far as they do not need the same token. Node E stands for the pool of bonus places. At most E + 1 nodes are settled,
    each scanned once: O(E^2). Returns the number of paths, 0 if no expert can be reached.
    """
    E = loss_EE.shape[0]
    for u in range(E + 1):
        dist[u] = 0.0 if u < E and excess[u] > 0 else np.inf
        settled[u] = np.inf
        parent[u] = -1
        used[u] = 0
    found = 0
    farthest = 0.0
    for _ in range(E + 1):
        u = _nearest(bits)
        if u < 0:
            break
        base = dist[u]
        if u < E and excess[u] < 0:
            node = u
            while parent[node] >= 0 and used[node] == 0:
                node = parent[node]
            if parent[node] < 0:
                node = u
                while parent[node] >= 0:
                    used[node] = 1  # the edge that leads here
                    node = parent[node]
                sinks[found] = u
                found += 1
                farthest = base
                if found == most:
                    break
        settled[u] = base
        dist[u] = -np.inf  # nothing is nearer
        if u < E:
            _relax(base, u, loss_EE[u], prices[u], prices, dist, parent)
            if num_bonus > 0 and bonus[u] == 0:
                d = base + max(0.0, prices[E] - prices[u])
                if d < dist[E]:
                    dist[E] = d
                    parent[E] = u
        else:
            for f in range(E):
                if bonus[f] == 1:
                    d = base + max(0.0, prices[f] - prices[E])
                    if d < dist[f]:
                        dist[f] = d
                        parent[f] = E
    for v in range(E + 1):
        if settled[v] < farthest:
            prices[v] += farthest - settled[v]
    return found


@kernel
def _usable(sink: int, parent: I64, excess: I64, bonus: I64, via_EE: I64) -> bool:
    """Whether a path still starts where there are too many and no path of the same search took a token it needs."""
    E = via_EE.shape[0]
    f = sink
    while parent[f] >= 0:
        e = parent[f]
        if (f == E and bonus[e] == 1) or (e == E and bonus[f] == 0):
            return False
        if e < E and f < E and via_EE[e, f] == STALE:
            return False
        f = e
    return excess[f] > 0


@kernel
def _push(
    sink: int, k: int, parent: I64, excess: I64, bonus: I64, open_NE: Floats, row: I64, value: F64, place: I64,
    weight: I64, first: I64, other: I64, slots: I64, head: I64, after: I64, before: I64, loss_EE: F64, via_EE: I64,
    stale: I64, tiled: I64, held: F64, looked: I64,
) -> int:  # fmt: skip
    """Move tokens along the path that ends at `sink`, as many as are tied on all of it; returns how many."""
    E = loss_EE.shape[0]
    source = sink
    through_pool = False
    while parent[source] >= 0:
        source = parent[source]
        through_pool = through_pool or source == E
    count = 1 if through_pool else min(excess[source], -excess[sink])
    f = sink
    if count > 1:
        paths, ties = looked
        looked[0] += 1
        if paths >= 16 and 8 * ties < paths and paths % 8 > 0:
            count = 1  # ties have been rare so far, so they are not always looked for
        while count > 1 and parent[f] >= 0:
            e = parent[f]
            count = tied(e, f, count, open_NE, row, value, weight, head, after, loss_EE[e, f])
            f = e
        looked[1] += 1 if count > 1 else 0
    f = sink
    while parent[f] >= 0:
        e = parent[f]
        if f == E:
            bonus[e] = 1
        elif e == E:
            bonus[f] = 0
        else:
            move(
                e, f, k, count, open_NE, row, value, place, weight, first, other, slots, head, after, before, tiled,
                held, loss_EE, via_EE, stale,
            )  # fmt: skip
        f = e
    excess[source] -= count
    excess[sink] += count
    return count


@kernel
def rebalance(
    open_NE: Floats, key: I64, row: I64, value: F64, place: I64, k: int, excess: I64, bonus: I64, num_bonus: int,
    prices: F64,
) -> tuple[int, int]:  # fmt: skip
    """Move tokens along shortest paths until no expert has too many or too few. Everything is changed in place.

    Slot i starts with row `row[i]` of the scores, earning `value[i]` in expert `place[i]`; `key[i]` is equal for equal
    rows. `excess` [E] is load minus target, summing to zero; `bonus` [E] says which experts hold one of the `num_bonus`
    extra places; `prices` [E + 1] ends with the price of a bonus place. On entry no slot may gain by moving at these
    prices. On exit `place[i]` is the expert of what was in slot i. Returns (BALANCED or UNREACHABLE, number of paths).

    Bound: every path takes at least one token from an expert with too many to one with too few, so there are at most
    sum(max(excess, 0)) <= T k paths. Tokens exactly tied on a whole path move together, as many as source and sink
    allow. Each path costs O(E^2) for Dijkstra plus O(E) per slot held by the experts on it.
    """
    E = open_NE.shape[1]
    S = value.shape[0]
    weight = np.ones(S, np.int64)
    first = np.arange(S)
    other = np.full(S, -1, np.int64)
    slots = np.full(1, S)
    if k == 1:  # with k > 1 the slots of a token must know each other
        slots[0] = merge_equal(open_NE, key, row, value, place, weight, first, other)
    head = np.full(E, -1, np.int64)
    after = np.empty(S, np.int64)
    before = np.empty(S, np.int64)
    for slot in range(slots[0] - 1, -1, -1):
        link(slot, place[slot], head, after, before)
    loss_EE = np.empty((E, E), np.float64)
    via_EE = np.empty((E, E), np.int64)
    for e in range(E):
        cheapest_moves(e, open_NE, row, value, head, after, loss_EE, via_EE)
    dist = np.empty(E + 1, np.float64)
    bits = dist.view(np.uint64)
    settled = np.empty(E + 1, np.float64)
    parent = np.empty(E + 1, np.int64)
    stale = np.zeros(E, np.int64)
    start = room_for_tiles(place, weight, slots[0] if k == 1 else 0, excess)
    tile = np.empty(start[E] * E if k == 1 else 0, open_NE.dtype)
    filled = np.zeros(E, np.int64)
    held = np.empty(start[E], np.float64)
    held_by = np.empty(start[E], np.int64)
    tiled = np.full(S, -1, np.int64)
    scratch = np.empty(S, np.float64)
    sinks = np.empty(E, np.int64)
    used = np.empty(E + 1, np.int64)
    looked = np.zeros(2, np.int64)  # for ties: on how many paths, and how often there were any
    left = 0
    for e in range(E):
        left += max(excess[e], 0)
    paths = 0
    status = BALANCED
    while left > 0:
        sources = 0
        for e in range(E):
            sources += 1 if excess[e] > 0 else 0
        most = sources if k == 1 else 1
        found = _shortest_paths(
            excess, loss_EE, prices, bonus, num_bonus, most, dist, bits, settled, parent, sinks, used
        )
        if found == 0:
            status = UNREACHABLE
            break
        for i in range(found):
            if _usable(sinks[i], parent, excess, bonus, via_EE):
                left -= _push(
                    sinks[i], k, parent, excess, bonus, open_NE, row, value, place, weight, first, other, slots, head,
                    after, before, loss_EE, via_EE, stale, tiled, held, looked,
                )  # fmt: skip
                paths += 1
        for e in range(E):
            if stale[e] > 0:
                refresh(
                    e, k, open_NE, row, value, head, after, start, tile, filled, held, held_by, tiled, scratch,
                    loss_EE, via_EE, stale,
                )  # fmt: skip
    found_place = np.empty(S, np.int64)
    for slot in range(slots[0]):
        i = first[slot]
        while i >= 0:
            found_place[i] = place[slot]
            i = other[i]
    place[:] = found_place
    return status, paths
