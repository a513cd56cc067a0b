"""Successive shortest paths on the E-node residual graph: the step that makes the answer exact.

Legend: N rows of scores, E experts, S slots (see `moves`).
"""

import numpy as np
from numpy.typing import NDArray

from lightning_base.assignment.kernel import kernel
from lightning_base.assignment.moves import cheapest_moves, link, merge_equal, move, refresh, tied

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Floats = NDArray[np.floating]

BALANCED, UNREACHABLE = 0, 1
SHARE = 4  # Dijkstra goes on until one in so many of the experts with too many tokens is served


@kernel
def _relax(base: float, u: int, loss: F64, price: float, prices: F64, dist: F64, waiting: F64, parent: I64) -> None:
    """Shorten the distance of every expert that is nearer through u. Branch-free, so it vectorises."""
    for f in range(loss.shape[0]):
        reduced = loss[f] - price + prices[f]
        # Rounding can leave a reduced cost a few ulps below zero; Dijkstra needs it at zero. Settled nodes need no
        # check: their distance is at most `base`.
        d = base + (reduced if reduced > 0.0 else 0.0)
        nearer = d < dist[f]
        dist[f] = d if nearer else dist[f]
        waiting[f] = d if nearer else waiting[f]
        parent[f] = u if nearer else parent[f]


@kernel
def _nearest(waiting: F64) -> int:
    """Index of the smallest entry, the first of equals; -1 if all are inf."""
    n = waiting.shape[0]
    lanes = np.empty(8, np.float64)
    for j in range(8):
        lanes[j] = np.inf
    for i in range(0, n - 7, 8):
        for j in range(8):
            x = waiting[i + j]
            lanes[j] = x if x < lanes[j] else lanes[j]
    least = np.inf
    for j in range(8):
        least = min(least, lanes[j])
    for i in range(n - n % 8, n):
        least = min(least, waiting[i])
    if least == np.inf:
        return -1
    for i in range(n):
        if waiting[i] == least:
            return i
    return -1


@kernel
def _shortest_paths(
    excess: I64, loss_EE: F64, prices: F64, bonus: I64, num_bonus: int, most: int,
    dist: F64, waiting: F64, parent: I64, sinks: I64, used: I64,
) -> int:  # fmt: skip
    """Dijkstra with reduced costs from all experts with too many tokens to up to `most` with too few; raises prices.

    The paths found start at different experts, so they lie in different trees and share no edge; at the new prices
    every edge on them costs nothing, so all may be used. Node E stands for the pool of bonus places. At most E + 1
    nodes are settled, each scanned once: O(E^2). Returns the number of paths, 0 if no expert can be reached.
    """
    E = loss_EE.shape[0]
    for u in range(E + 1):
        dist[u] = 0.0 if u < E and excess[u] > 0 else np.inf
        waiting[u] = dist[u]
        parent[u] = -1
        used[u] = 0
    found = 0
    for _ in range(E + 1):
        u = _nearest(waiting)
        if u < 0:
            break
        if u < E and excess[u] < 0:
            root = u
            while parent[root] >= 0:
                root = parent[root]
            if used[root] == 0:
                used[root] = 1
                sinks[found] = u
                found += 1
                if found == most:
                    break
        waiting[u] = np.inf
        if u < E:
            _relax(dist[u], u, loss_EE[u], prices[u], prices, dist, waiting, parent)
            if num_bonus > 0 and bonus[u] == 0:
                d = dist[u] + max(0.0, prices[E] - prices[u])
                if d < dist[E]:
                    dist[E] = d
                    waiting[E] = d
                    parent[E] = u
        else:
            for f in range(E):
                if bonus[f] == 1:
                    d = dist[E] + max(0.0, prices[f] - prices[E])
                    if d < dist[f]:
                        dist[f] = d
                        waiting[f] = d
                        parent[f] = E
    if found > 0:
        farthest = dist[sinks[found - 1]]
        for v in range(E + 1):
            if dist[v] < farthest:
                prices[v] += farthest - dist[v]
    return found


@kernel
def _push(
    sink: int, k: int, parent: I64, excess: I64, bonus: I64, open_NE: Floats, row: I64, value: F64, place: I64,
    weight: I64, first: I64, other: I64, slots: I64, head: I64, after: I64, before: I64, loss_EE: F64, via_EE: I64,
    stale: I64,
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
    while count > 1 and parent[f] >= 0:
        e = parent[f]
        count = tied(e, f, count, open_NE, row, value, weight, head, after, loss_EE[e, f])
        f = e
    f = sink
    while parent[f] >= 0:
        e = parent[f]
        if f == E:
            bonus[e] = 1
        elif e == E:
            bonus[f] = 0
        else:
            move(
                e, f, k, count, open_NE, row, value, place, weight, first, other, slots, head, after, before, loss_EE,
                via_EE, stale,
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
    waiting = np.empty(E + 1, np.float64)
    parent = np.empty(E + 1, np.int64)
    stale = np.zeros(E, np.int64)
    sinks = np.empty(E, np.int64)
    used = np.empty(E + 1, np.int64)
    left = 0
    for e in range(E):
        left += max(excess[e], 0)
    paths = 0
    status = BALANCED
    while left > 0:
        sources = 0
        for e in range(E):
            sources += 1 if excess[e] > 0 else 0
        most = 1 + sources // SHARE if k == 1 else 1  # with k > 1 two paths could want to move the same token
        found = _shortest_paths(excess, loss_EE, prices, bonus, num_bonus, most, dist, waiting, parent, sinks, used)
        if found == 0:
            status = UNREACHABLE
            break
        for i in range(found):
            left -= _push(
                sinks[i], k, parent, excess, bonus, open_NE, row, value, place, weight, first, other, slots, head,
                after, before, loss_EE, via_EE, stale,
            )  # fmt: skip
        paths += found
        for e in range(E):
            if stale[e] > 0:
                refresh(e, open_NE, row, value, head, after, loss_EE, via_EE, stale)
    found_place = np.empty(S, np.int64)
    for slot in range(slots[0]):
        i = first[slot]
        while i >= 0:
            found_place[i] = place[slot]
            i = other[i]
    place[:] = found_place
    return status, paths
