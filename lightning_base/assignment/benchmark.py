"""Times of the exact solver against its peers, in one process, interleaved, on one thread, as a table of ratios.

Legend: T tokens, E experts.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor

from lightning_base.assignment import balanced_assignment
from lightning_base.assignment.examples import EXAMPLES

SIZES = [(1024, 8), (4096, 16), (8192, 64), (8192, 128), (16384, 128)]
GROWTH = [(4096, 64), (8192, 64), (16384, 128), (32768, 128), (65536, 256), (131072, 256)]
Method = Callable[[], object]
TURN = 0.01


def run(quick: bool = False) -> None:
    """Print compile time, the table of times and ratios, growth with size, and the gain from threads.

    Args:
        quick: the three smaller sizes, fewer repetitions and no growth table; about half a minute instead of three.
    """
    torch.set_num_threads(1)
    print(f"compilation, once per machine: {compile_seconds():.1f} s")
    sizes = SIZES[:3] if quick else SIZES
    print(
        "milliseconds, medians; '/cold': over the cold solve; 'cold/', 'warm/': the solve over argmax(1) and the floor"
    )
    columns = "cold warm | auction /cold emd /cold flow /cold scipy | argmax cold/ warm/ floor cold/ warm/"
    print(f"{'T x E':>12} {'scores':<21} {columns}")
    for T, E in sizes:
        for kind in EXAMPLES:
            print(row(T, E, kind, 1.0 if quick else 3.0), flush=True)
    if not quick:
        print_growth()


def row(T: int, E: int, kind: str, seconds: float) -> str:
    """One line of the table: every method on one matrix."""
    both = EXAMPLES[kind](2 * T, E, torch.Generator().manual_seed(T + E))
    previous, scores = both[:T], both[T:].clone()
    prices = balanced_assignment(previous).prices  # a warm start is the batch before: same router, other tokens
    methods: dict[str, Method] = {
        "cold": lambda: balanced_assignment(scores),
        "warm": lambda: balanced_assignment(scores, prices=prices),
        "argmax": lambda: scores.argmax(1),
        "floor": floor_pass(scores),
        "auction": lambda: balanced_assignment(scores, solver="auction"),
    }
    methods.update(peers(scores))
    if T <= 1024:
        methods["scipy"] = lambda: balanced_assignment(scores, solver="oracle")
    ms = interleaved(methods, seconds)
    cold, warm = ms["cold"], ms["warm"]
    text = f"{T:>6} x {E:<3} {kind:<21} {cold:.2f} {warm:.2f} |"
    for peer in ("auction", "emd", "flow"):
        text += f" {ms[peer]:.1f} {ms[peer] / cold:.1f}x" if peer in ms else " - -"
    text += f" {ms['scipy']:.0f} |" if "scipy" in ms else " - |"
    for cheap in ("argmax", "floor"):
        text += f" {ms[cheap]:.3f} {cold / ms[cheap]:.1f} {warm / ms[cheap]:.1f}"
    return text


def interleaved(methods: dict[str, Method], seconds: float, most: int = 25) -> dict[str, float]:
    """Median milliseconds of each method; rounds in turn, a method dropping out once it has used its `seconds`.

    A turn lasts at least `TURN` seconds: otherwise quick methods would mostly be timed on reading back what the slow
    method before them has pushed out of the caches.
    """
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for method in methods.values():
        method()
    for _ in range(most):
        for name, method in methods.items():
            if sum(taken[name]) < seconds:
                turn = time.perf_counter()
                while True:
                    start = time.perf_counter()
                    method()
                    end = time.perf_counter()
                    taken[name].append(end - start)
                    if end - turn >= TURN:
                        break
    return {name: 1e3 * median(times) for name, times in taken.items()}


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


def print_growth() -> None:
    """Cold times up to 131072 x 256, the fitted exponent of T E, and what more threads give."""
    threads = os.cpu_count() or 1
    print(f"growth, correlated centroids, cold, milliseconds on 1 and {threads} threads")
    work, times = [], []
    for T, E in GROWTH:
        scores = EXAMPLES["correlated centroids"](T, E, torch.Generator().manual_seed(0))
        torch.set_num_threads(1)
        one = interleaved({"cold": lambda s=scores: balanced_assignment(s)}, 5.0)["cold"]  # type: ignore[misc]
        torch.set_num_threads(threads)
        all_ = interleaved({"cold": lambda s=scores: balanced_assignment(s)}, 5.0)["cold"]  # type: ignore[misc]
        torch.set_num_threads(1)
        print(f"{T:>7} x {E:<4} {one:9.2f} {all_:9.2f}", flush=True)
        work.append(np.log(T * E))
        times.append(np.log(one))
    print(f"time grows as (T E) to the power {np.polyfit(work, times, 1)[0]:.2f}")


def compile_seconds() -> float:
    """Seconds that a first call takes with an empty cache, less those it takes with a full one."""
    program = (
        "import time, torch; from lightning_base.assignment import balanced_assignment as b; s = torch.randn(4096, 8);"
        "t = time.perf_counter(); b(s); print(time.perf_counter() - t)"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        first, second = (
            float(subprocess.run([sys.executable, "-c", program], env=environment, check=True, stdout=-1).stdout)
            for _ in range(2)
        )
    return first - second
