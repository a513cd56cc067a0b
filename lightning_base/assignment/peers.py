"""What the exact solver is held against: the least that one look at the scores costs, and solvers of other people.

Legend: T tokens, E experts.
"""

import sys
from collections.abc import Callable

import numpy as np
from torch import Tensor

Method = Callable[[], object]


def floor_pass(scores_TE: Tensor) -> Method:
    """The pass "best two of s - p" on scores already turned: what one look at every score costs."""
    from lightning_base.assignment.passes import BLOCK, best_two, turn

    scores = scores_TE.float().contiguous().numpy()
    T, E = scores.shape
    blocks = -(-T // BLOCK)
    turned = np.empty((blocks, E, BLOCK), scores.dtype)
    turn(scores, 0, blocks, turned)
    prices, best, margin = np.zeros(E, scores.dtype), np.empty(T, np.int32), np.empty(T, scores.dtype)
    load = np.zeros(E, np.int64)
    return lambda: best_two(turned, prices, 0, blocks, best, margin, load)


def peers(scores_TE: Tensor) -> dict[str, Method]:
    """Solvers of the `bench` extra that are installed: POT's network simplex and OR-tools' min-cost flow."""
    T, E = scores_TE.shape
    found: dict[str, Method] = {}
    cost = -scores_TE.double().numpy()
    try:
        import ot

        share = np.full(T, 1 / T), np.full(E, 1 / E)
        found["emd"] = lambda: ot.emd(*share, cost, numItermax=10**8)
    except ImportError:
        print("POT is not installed: pip install lightning-base[bench]", file=sys.stderr)
    if T % E:
        return found  # the flow below has even loads only
    try:
        from ortools.graph.python import min_cost_flow

        token, expert = np.divmod(np.arange(T * E), E)
        tail, head = np.concatenate([token, T + np.arange(E)]), np.concatenate([T + expert, np.full(E, T + E)])
        room = np.concatenate([np.ones(T * E, np.int64), np.full(E, T // E)])
        whole = np.concatenate([np.round(cost * 2**20).astype(np.int64).ravel(), np.zeros(E, np.int64)])
        supply = np.concatenate([np.ones(T, np.int64), np.zeros(E, np.int64), [-T]])

        def flow() -> int:
            solver = min_cost_flow.SimpleMinCostFlow()
            solver.add_arcs_with_capacity_and_unit_cost(tail, head, room, whole)
            solver.set_nodes_supplies(np.arange(T + E + 1), supply)
            return solver.solve()

        found["flow"] = flow
    except ImportError:
        print("OR-tools is not installed: pip install lightning-base[bench]", file=sys.stderr)
    return found
