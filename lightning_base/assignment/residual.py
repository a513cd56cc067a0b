"""Successive shortest paths on the E-node residual graph: the step that makes the answer exact.

Legend: N rows (tokens that may still move), E experts, S = N k slots (slot i belongs to row i // k and sits in one
expert). `open_NE[r, e]` is the score row r would earn in expert e, or -inf if it is already there or forbidden.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_base.assignment.kernel import kernel

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Floats = NDArray[np.floating]  # scores stay as they came; every sum and difference is in double precision

BALANCED, UNREACHABLE = 0, 1
SHARE = 4  # Dijkstra goes on until one in so many of the experts with too many tokens is served
STALE = -2  # a residual edge whose cheapest token has just left


@kernel
def _link(slot: int, expert: int, head: I64, after: I64, before: I64) -> None:
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
def _offer(slot: int, row: Floats, earned: float, loss: F64, via: I64) -> None:
    """Enter one slot into the row of the residual graph that belongs to its expert. Branch-free, so it vectorises."""
    for f in range(row.shape[0]):
        d = earned - row[f]
        less = d < loss[f]
        loss[f] = d if less else loss[f]
        via[f] = slot if less else via[f]


@kernel
def _cheapest_moves(
    e: int, k: int, open_NE: Floats, value: F64, head: I64, after: I64, loss_EE: F64, via_EE: I64
) -> None:
    """Row e of the residual graph: the least loss of moving one token from e to each other expert, and which slot."""
    E = open_NE.shape[1]
    loss = loss_EE[e]
    via = via_EE[e]
    for f in range(E):
        loss[f] = np.inf
        via[f] = -1
    slot = head[e]
    while slot >= 0:
        _offer(slot, open_NE[slot // k], value[slot], loss, via)
        slot = after[slot]


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
def _tied(e: int, f: int, k: int, limit: int, open_NE: Floats, value: F64, head: I64, after: I64, loss: float) -> int:
    """How many tokens of e (at most `limit`) move to f at exactly the least loss."""
    count = 0
    slot = head[e]
    while slot >= 0 and count < limit:
        if value[slot] - open_NE[slot // k, f] == loss:
            count += 1
        slot = after[slot]
    return count


@kernel
def _move(
    e: int, f: int, k: int, count: int, open_NE: Floats, value: F64, place: I64,
    head: I64, after: I64, before: I64, loss_EE: F64, via_EE: I64, stale: I64,
) -> None:  # fmt: skip
    """Move `count` tokens that lose the least from e to f, and mark what this makes stale in the residual graph."""
    E = open_NE.shape[1]
    loss = loss_EE[e, f]
    if count > 4:  # cheaper to recompute both rows than to enter so many slots one by one
        stale[e] = 2
        stale[f] = 2
    slot = head[e]
    while slot >= 0 and count > 0:
        following = after[slot]
        row = slot // k
        if value[slot] - open_NE[row, f] == loss:
            _unlink(slot, e, head, after, before)
            _link(slot, f, head, after, before)
            open_NE[row, e], value[slot], open_NE[row, f] = value[slot], open_NE[row, f], -np.inf
            place[slot] = f
            count -= 1
            if stale[f] == 2 and stale[e] == 2:
                slot = following
                continue
            left = via_EE[e]
            for g in range(E):
                left[g] = STALE if left[g] == slot else left[g]
            stale[e] = max(stale[e], 1)
            _offer(slot, open_NE[row], value[slot], loss_EE[f], via_EE[f])
            if k > 1:  # the token's other slots may now move to e and no longer to f
                for sibling in range(row * k, row * k + k):
                    stale[place[sibling]] = 2
        slot = following


@kernel
def _refresh(
    e: int, k: int, open_NE: Floats, value: F64, head: I64, after: I64, loss_EE: F64, via_EE: I64, stale: I64
) -> None:
    """Recompute the stale entries of row e: the one or two columns whose cheapest token has left, or all."""
    E = open_NE.shape[1]
    columns = 0
    for g in range(E):
        columns += 1 if via_EE[e, g] == STALE else 0
    if stale[e] == 2 or 8 * columns > E:  # reading whole rows vectorises, reading columns does not
        _cheapest_moves(e, k, open_NE, value, head, after, loss_EE, via_EE)
    elif columns > 0:
        for g in range(E):
            if via_EE[e, g] == STALE:
                least = np.inf
                via = -1
                slot = head[e]
                while slot >= 0:
                    d = value[slot] - open_NE[slot // k, g]
                    if d < least:
                        least = d
                        via = slot
                    slot = after[slot]
                loss_EE[e, g] = least
                via_EE[e, g] = via
    stale[e] = 0


@kernel
def _push(
    sink: int, k: int, parent: I64, excess: I64, bonus: I64, open_NE: Floats, value: F64, place: I64,
    head: I64, after: I64, before: I64, loss_EE: F64, via_EE: I64, stale: I64,
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
        count = min(count, _tied(e, f, k, count, open_NE, value, head, after, loss_EE[e, f]))
        f = e
    f = sink
    while parent[f] >= 0:
        e = parent[f]
        if f == E:
            bonus[e] = 1
        elif e == E:
            bonus[f] = 0
        else:
            _move(e, f, k, count, open_NE, value, place, head, after, before, loss_EE, via_EE, stale)
        f = e
    excess[source] -= count
    excess[sink] += count
    return count


@kernel
def rebalance(
    open_NE: Floats, value: F64, place: I64, k: int, excess: I64, bonus: I64, num_bonus: int, enough: int, prices: F64
) -> tuple[int, int]:
    """Move tokens along shortest paths until no more than `enough` are too many somewhere. All is changed in place.

    `excess` [E] is load minus target, summing to zero; `bonus` [E] says which experts hold one of the `num_bonus` extra
    places; `prices` [E + 1] ends with the price of a bonus place. On entry no slot may gain by moving at these
    prices. Returns (BALANCED or UNREACHABLE, number of paths).

    Bound: every path takes at least one token from an expert with too many to one with too few, so there are at most
    sum(max(excess, 0)) <= T k paths. Tokens exactly tied on a whole path move together, as many as source and sink
    allow. Each path costs O(E^2) for Dijkstra plus O(E) per token held by the experts on it.
    """
    E = open_NE.shape[1]
    S = value.shape[0]
    head = np.full(E, -1, np.int64)
    after = np.empty(S, np.int64)
    before = np.empty(S, np.int64)
    for slot in range(S - 1, -1, -1):
        _link(slot, place[slot], head, after, before)
    loss_EE = np.empty((E, E), np.float64)
    via_EE = np.empty((E, E), np.int64)
    for e in range(E):
        _cheapest_moves(e, k, open_NE, value, head, after, loss_EE, via_EE)
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
    while left > enough:
        sources = 0
        for e in range(E):
            sources += 1 if excess[e] > 0 else 0
        most = 1 + sources // SHARE if k == 1 else 1  # with k > 1 two paths could want to move the same token
        found = _shortest_paths(excess, loss_EE, prices, bonus, num_bonus, most, dist, waiting, parent, sinks, used)
        if found == 0:
            return UNREACHABLE, paths
        for i in range(found):
            count = _push(
                sinks[i], k, parent, excess, bonus, open_NE, value, place, head, after, before, loss_EE, via_EE, stale
            )
            left -= count
        paths += found
        for e in range(E):
            if stale[e] > 0:
                _refresh(e, k, open_NE, value, head, after, loss_EE, via_EE, stale)
    return BALANCED, paths
