"""What one exact solve does: the processor time of each phase, and how many steps, searches and paths it takes.

Legend: T tokens, E experts.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lightning_base.assignment import balanced_assignment, residual, restricted, transport
from lightning_base.assignment.choice import Choice

TURNING, PASSES, NEWTON, PATHS, REST = "turning", "passes", "Newton steps", "shortest paths", "the rest"
PHASES = (TURNING, PASSES, NEWTON, PATHS, REST)


@dataclass(frozen=True)
class Profile:
    """One solve.

    Args:
        ms: by the names in ``PHASES``, processor time of this thread.
        newton_steps: on all tokens and on samples.
        too_many: tokens that were too many in their experts when shortest paths began on all tokens.
        rounds_of_paths: shortest paths on all tokens; one more for each time that a held token wanted to leave.
        searches: of Dijkstra, on all tokens and on samples.
        paths: that tokens moved along.
        tokens_moved: from one expert to another, counted on every edge of a path.
    """

    ms: dict[str, float]
    newton_steps: int
    too_many: int
    rounds_of_paths: int
    searches: int
    paths: int
    tokens_moved: int


def profile(scores_TE: Float[Tensor, "T E"], prices: Float[Tensor, " E"] | None = None) -> Profile:
    """Two solves on one thread: one timed as it is, one with what calls the kernels in Python, where calls can be seen.

    Args:
        scores_TE: as ``balanced_assignment`` takes them, with k = 1.
        prices: to start from, if any.
    """
    balanced_assignment(scores_TE, prices=prices)
    seconds, calls = timed(lambda: balanced_assignment(scores_TE, prices=prices))
    ms = {phase: 1e3 * seconds[phase] for phase in PHASES}
    seen = counted(lambda: balanced_assignment(scores_TE, prices=prices), len(scores_TE))
    return Profile(ms, calls, seen["too many"], seen["rounds"], seen["searches"], seen["paths"], seen["tokens"])


def timed(solve: Callable[[], object]) -> tuple[dict[str, float], int]:
    """Seconds of each phase, and the number of Newton steps."""
    seconds = dict.fromkeys(PHASES, 0.0)
    steps = 0

    def charged(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            nonlocal steps
            steps += phase == NEWTON
            began = time.thread_time()
            found = function(*args, **options)
            seconds[phase] += time.thread_time() - began
            return found

        return run

    places = [
        (Choice, "__init__", TURNING),
        (Choice, "at", PASSES),
        (transport, "newton_step", NEWTON),
        (transport, "assign_movable", PATHS),
    ]
    with replaced([(where, name, charged(phase, getattr(where, name))) for where, name, phase in places]):
        began = time.thread_time()
        solve()
        seconds[REST] = time.thread_time() - began - sum(seconds.values())
    return seconds, steps


def counted(solve: Callable[[], object], tokens: int) -> Counter[str]:
    """Searches, paths, tokens moved, and how many were too many when paths began on all ``tokens``."""
    seen: Counter[str] = Counter()
    search, push, rebalance = residual._shortest_paths, residual._push, residual.rebalance.py_func  # type: ignore[attr-defined]

    def counting_search(*args: Any) -> int:
        seen["searches"] += 1
        return search(*args)

    def counting_push(sink: Any, k: int, parent: Any, *args: Any) -> int:
        moved = push(sink, k, parent, *args)
        edges, node = 0, sink
        while parent[node] >= 0:
            edges, node = edges + 1, parent[node]
        seen["paths"] += 1
        seen["tokens"] += moved * edges
        return moved

    def counting_rebalance(open_NE: Any, *args: Any) -> tuple[int, int]:
        excess = args[5]
        if len(open_NE) == tokens:
            if not seen["rounds"]:
                seen["too many"] = int(excess[excess > 0].sum())
            seen["rounds"] += 1
        found: tuple[int, int] = rebalance(open_NE, *args)
        return found

    with replaced(
        [
            (residual, "_shortest_paths", counting_search),
            (residual, "_push", counting_push),
            (restricted, "rebalance", counting_rebalance),
            (transport, "assign_movable", restricted.assign_movable.py_func),  # type: ignore[attr-defined]
        ]
    ):
        solve()
    return seen


@contextmanager
def replaced(places: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Inside, each of these names stands for something else."""
    before = [getattr(where, name) for where, name, _ in places]
    for where, name, new in places:
        setattr(where, name, new)
    try:
        yield
    finally:
        for (where, name, _), old in zip(places, before, strict=True):
            setattr(where, name, old)
