"""Times of the exact solver against its peers, in one process, interleaved, on one thread, as ratios.

Measuring gives a list of plain records, one for each matrix; `summary` and `table` show the median and the worst of
each kind. Times are processor times of the thread, which others on the machine lengthen less.

Legend: T tokens, E experts.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from lightning_base.assignment import balanced_assignment
from lightning_base.assignment.examples import EXAMPLES, VARIATIONS
from lightning_base.assignment.peers import Method, floor_pass, peers

QUICK = [(1024, 8), (4096, 60), (8192, 64), (8192, 128)]
SIZES = [(1024, 8), (4096, 16), (4096, 60), (8192, 64), (8192, 100), (8192, 128), (16384, 128)]
GROWTH = [(4096, 64), (8192, 64), (16384, 128), (32768, 128), (65536, 256), (131072, 256)]
RATIOS = (
    "cold / argmax",
    "warm / argmax",
    "cold / floor",
    "warm / floor",
    "emd / cold",
    "auction / cold",
    "flow / cold",
)
PLAIN = "as drawn"  # the variation that every kind has
Record = dict[str, Any]


def run(quick: bool = False) -> None:
    """Print compile time, the table of ratios, growth with size, and the gain from threads.

    Args:
        quick: four sizes, fewer repetitions and no growth table; less than a minute instead of several.
    """
    print(f"compilation, once per machine: {compile_seconds():.1f} s")
    print(table(records(quick)))
    if not quick:
        print_growth()


def records(quick: bool = False) -> list[Record]:
    """Every size, kind and variation: milliseconds of each method, and ratios of them.

    A record has `subject`, `size`, `kind`, `variation`, `ms` by method and `ratios` by the names in `RATIOS`, as far as
    both methods ran. The quick form leaves slow peers out of all but the smallest size and the plain variation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            measured(T, E, kind, variation, quick)
            for T, E in (QUICK if quick else SIZES)
            for kind in VARIATIONS
            for variation in VARIATIONS[kind]
        ]
    finally:
        torch.set_num_threads(threads)


def measured(T: int, E: int, kind: str, variation: str, quick: bool) -> Record:
    """One record: every method on one matrix, warm from the prices of another batch of the same router."""
    both = VARIATIONS[kind][variation](2 * T, E, torch.Generator().manual_seed(T + E))
    previous, scores = both[:T], both[T:].clone()
    prices = balanced_assignment(previous).prices
    methods: dict[str, Method] = {
        "cold": lambda: balanced_assignment(scores),
        "warm": lambda: balanced_assignment(scores, prices=prices),
        "argmax": lambda: scores.argmax(1),
        "floor": floor_pass(scores),
    }
    plain = variation == PLAIN
    if T <= 1024 or plain or not quick:
        methods.update({name: peer for name, peer in peers(scores).items() if name == "emd" or plain})
    if plain:
        methods["auction"] = lambda: balanced_assignment(scores, solver="auction")
    if plain and T <= 1024 and not quick:
        methods["scipy"] = lambda: balanced_assignment(scores, solver="oracle")
    ms = interleaved(methods, *((0.03, 0.003, 5) if quick else (0.3, 0.01, 15)))
    pairs = {name: name.split(" / ") for name in RATIOS}
    ratios = {name: ms[over] / ms[under] for name, (over, under) in pairs.items() if over in ms and under in ms}
    return {
        "subject": "assignment", "size": f"{T} x {E}", "kind": kind, "variation": variation, "ms": ms, "ratios": ratios,
    }  # fmt: skip


def interleaved(methods: Mapping[str, Method], seconds: float, turn: float, most: int) -> dict[str, float]:
    """Median milliseconds of each method; rounds in turn, a method dropping out once it has used its `seconds`.

    A turn lasts at least `turn` seconds: otherwise quick methods would mostly be timed on reading back what the slow
    method before them has pushed out of the caches.
    """
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for method in methods.values():
        method()
    for _ in range(most):
        for name, method in methods.items():
            if sum(taken[name]) < seconds:
                began = time.thread_time()
                while True:
                    start = time.thread_time()
                    method()
                    end = time.thread_time()
                    taken[name].append(end - start)
                    if end - began >= turn:
                        break
    return {name: 1e3 * median(times) for name, times in taken.items()}


def summary(found: Sequence[Record]) -> list[dict[str, Any]]:
    """For each size and kind: the median and the worst over its variations of every ratio and time, and which it was.

    The worst is the largest; of peers over the cold solve it is the smallest.
    """
    rows = []
    for size, kind in dict.fromkeys((record["size"], record["kind"]) for record in found):
        row: dict[str, Any] = {"size": size, "kind": kind}
        mine = [record for record in found if (record["size"], record["kind"]) == (size, kind)]
        for name in (*RATIOS, "cold", "warm"):
            value = {
                r["variation"]: {**r["ratios"], **r["ms"]}[name] for r in mine if name in {**r["ratios"], **r["ms"]}
            }
            if value:
                worst = (min if name.endswith("/ cold") else max)(value, key=value.__getitem__)
                row[name] = median(value.values()), value[worst], worst
        rows.append(row)
    return rows


def table(found: Sequence[Record]) -> str:
    """Markdown: ratios first, then milliseconds; a cell is the median and the worst over the variations of a kind."""
    columns = [name for name in (*RATIOS, "cold", "warm") if any(name in row for row in summary(found))]
    lines = ["| T x E | scores | " + " | ".join(columns) + " | worst cold, warm |", "| --- " * (len(columns) + 3) + "|"]
    for row in summary(found):
        cells = [f"{row[name][0]:.2g}, {row[name][1]:.2g}" if name in row else "-" for name in columns]
        named = f"{row['cold / argmax'][2]}; {row['warm / argmax'][2]}"
        lines.append(f"| {row['size']} | {row['kind']} | {' | '.join(cells)} | {named} |")
    return "\n".join(lines)


def print_growth() -> None:
    """Cold times up to 131072 x 256, the fitted exponent of T E, and what more threads give."""
    threads = os.cpu_count() or 1
    print(f"growth, correlated centroids, cold, milliseconds on 1 and {threads} threads")
    work, times = [], []
    for T, E in GROWTH:
        scores = EXAMPLES["correlated centroids"](T, E, torch.Generator().manual_seed(0))
        torch.set_num_threads(1)
        one = wall(lambda s=scores: balanced_assignment(s))  # type: ignore[misc]
        torch.set_num_threads(threads)
        all_ = wall(lambda s=scores: balanced_assignment(s))  # type: ignore[misc]
        torch.set_num_threads(1)
        print(f"{T:>7} x {E:<4} {one:9.2f} {all_:9.2f}", flush=True)
        work.append(np.log(T * E))
        times.append(np.log(one))
    print(f"time grows as (T E) to the power {np.polyfit(work, times, 1)[0]:.2f}")


def wall(method: Callable[[], object]) -> float:
    """Median milliseconds on the clock, which several threads may shorten."""
    taken = []
    for _ in range(9):
        start = time.perf_counter()
        method()
        taken.append(time.perf_counter() - start)
    return 1e3 * median(taken[1:])


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
