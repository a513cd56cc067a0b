"""Successive shortest paths on the E-node residual graph: the step that makes the answer exact.

Legend: N rows (tokens that may still move), E experts, S = N k slots (slot i belongs to row i // k and sits in one
expert). `open_NE[r, e]` is the score row r would earn in expert e, or -inf if it is already there or forbidden.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_base.assignment.kernel import kernel

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

BALANCED, UNREACHABLE = 0, 1


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
def _cheapest_moves(e: int, k: int, open_NE: F64, value: F64, head: I64, after: I64, loss_EE: F64, via_EE: I64) -> None:
    """Row e of the residual graph: the least loss of moving one token from e to each other expert, and which slot."""
    E = open_NE.shape[1]
    loss = loss_EE[e]
    via = via_EE[e]
    for f in range(E):
        loss[f] = np.inf
        via[f] = -1
    slot = head[e]
    while slot >= 0:
        row = open_NE[slot // k]
        v = value[slot]
        for f in range(E):
            d = v - row[f]
            less = d < loss[f]
            loss[f] = d if less else loss[f]
            via[f] = slot if less else via[f]
        slot = after[slot]


@kernel
def _shortest_path(
    excess: I64, loss_EE: F64, prices: F64, bonus: I64, num_bonus: int, dist: F64, done: I64, parent: I64
) -> int:
    """Dijkstra with reduced costs from all experts with too many tokens to the nearest with too few; raises prices.

    Node E stands for the pool of bonus places. At most E + 1 nodes are settled, each scanned once: O(E^2).
    Returns the expert reached, or -1 if none can be.
    """
    E = loss_EE.shape[0]
    for u in range(E + 1):
        dist[u] = np.inf
        done[u] = 0
        parent[u] = -1
    for u in range(E):
        if excess[u] > 0:
            dist[u] = 0.0
    for _ in range(E + 1):
        u = -1
        best = np.inf
        for v in range(E + 1):
            if done[v] == 0 and dist[v] < best:
                best = dist[v]
                u = v
        if u < 0:
            return -1
        if u < E and excess[u] < 0:
            for v in range(E + 1):
                if done[v] == 1:
                    prices[v] += best - dist[v]
            return u
        done[u] = 1
        if u < E:
            for f in range(E):
                # Rounding can leave a reduced cost a few ulps below zero; Dijkstra needs it at zero.
                d = best + max(0.0, loss_EE[u, f] - prices[u] + prices[f])
                if done[f] == 0 and d < dist[f]:
                    dist[f] = d
                    parent[f] = u
            if num_bonus > 0 and bonus[u] == 0:
                d = best + max(0.0, prices[E] - prices[u])
                if done[E] == 0 and d < dist[E]:
                    dist[E] = d
                    parent[E] = u
        else:
            for f in range(E):
                if bonus[f] == 1:
                    d = best + max(0.0, prices[f] - prices[E])
                    if done[f] == 0 and d < dist[f]:
                        dist[f] = d
                        parent[f] = E
    return -1


@kernel
def _tied(e: int, f: int, k: int, limit: int, open_NE: F64, value: F64, head: I64, after: I64, loss: float) -> int:
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
    e: int, f: int, k: int, count: int, open_NE: F64, value: F64, place: I64,
    head: I64, after: I64, before: I64, loss: float, dirty: I64,
) -> None:  # fmt: skip
    """Move `count` tokens that lose exactly `loss` from e to f; experts whose row of the graph changes become dirty."""
    slot = head[e]
    while slot >= 0 and count > 0:
        following = after[slot]
        row = slot // k
        if value[slot] - open_NE[row, f] == loss:
            _unlink(slot, e, head, after, before)
            _link(slot, f, head, after, before)
            open_NE[row, e], value[slot], open_NE[row, f] = value[slot], open_NE[row, f], -np.inf
            place[slot] = f
            for sibling in range(row * k, row * k + k):
                dirty[place[sibling]] = 1
            count -= 1
        slot = following
    dirty[e] = 1


@kernel
def rebalance(
    open_NE: F64, value: F64, place: I64, k: int, excess: I64, bonus: I64, num_bonus: int, prices: F64
) -> tuple[int, int]:
    """Move tokens along shortest paths until no expert has too many or too few. Everything is changed in place.

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
    done = np.empty(E + 1, np.int64)
    parent = np.empty(E + 1, np.int64)
    dirty = np.zeros(E, np.int64)
    left = 0
    for e in range(E):
        left += max(excess[e], 0)
    paths = 0
    while left > 0:
        sink = _shortest_path(excess, loss_EE, prices, bonus, num_bonus, dist, done, parent)
        if sink < 0:
            return UNREACHABLE, paths
        paths += 1
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
                _move(e, f, k, count, open_NE, value, place, head, after, before, loss_EE[e, f], dirty)
            f = e
        for e in range(E):
            if dirty[e] == 1:
                _cheapest_moves(e, k, open_NE, value, head, after, loss_EE, via_EE)
                dirty[e] = 0
        excess[source] -= count
        excess[sink] += count
        left -= count
    return BALANCED, paths
