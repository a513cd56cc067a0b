"""The program behind ``experiments/claims.py``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_base.claims import paper
from lightning_base.claims.page import fill
from lightning_base.claims.speed import StepTimes, measure
from lightning_base.claims.studies import MissingError, Studies
from lightning_base.claims.verdict import Judged
from lightning_base.claims.why import TABLES
from lightning_base.claims.words import Routing, routing_of
from lightning_base.program.explain import BAD_INPUT
from lightning_base.program.rank import quiet
from lightning_base.results.read import ReportError

PAGE = Path("docs/claims.md")
ROUTED = ("BASE", "Switch", "TopK", "Hash")


def judge(studies: Studies, times: StepTimes) -> list[Judged | tuple[str, str]]:
    """All claims in their order; one whose experiments have not run is named with what is missing."""
    routing: dict[str, Routing] = {}

    def with_routing(claim: Callable[..., Judged]) -> Judged:
        if not routing:
            paths = [run.path for router in ROUTED for run in studies.arm("compare", router).values()]
            routing.update(routing_of(paths))
        return claim(studies, routing)

    claims: list[tuple[str, Callable[[], Judged]]] = [
        ("Balance without loss or hyperparameter.", lambda: paper.balance(studies)),
        ("Compute efficiency.", lambda: paper.efficiency(studies, times)),
        ("Tokens per second.", lambda: paper.throughput(times)),
        ("One large expert layer.", lambda: paper.one_large_layer(studies)),
        ("Position, number and size.", lambda: paper.robustness(studies)),
        ("Balance at test time.", lambda: with_routing(paper.test_balance)),
        ("Local specialisation.", lambda: with_routing(paper.specialization)),
        ("Exact assignment or auction.", lambda: paper.left_open(studies)),
    ]
    found: list[Judged | tuple[str, str]] = []
    for title, claim in claims:
        try:
            found.append(claim())
        except (MissingError, ReportError) as error:
            found.append((title, str(error)))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Judges the claims by the experiments that have run, and writes the page; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="claims.py",
        description="Judges the claims of the BASE paper by finished experiments; `make claims` runs them.",
    )
    parser.add_argument(
        "runs", type=Path, nargs="?", default=Path("runs"), help="the folder with a folder per experiment"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help=f"the page whose tables are filled; {PAGE} by default")
    parser.add_argument("overrides", nargs="*", help="configuration of the arms whose steps are timed")
    options = parser.parse_args(arguments)
    if not options.runs.is_dir() or not options.page.is_file():
        gone = options.runs if not options.runs.is_dir() else options.page
        print(f"error: {gone} is not there: make claims runs the experiments and writes {PAGE}", file=sys.stderr)
        return BAD_INPUT
    quiet()
    studies = Studies(options.runs)
    judged = judge(studies, measure(options.runs / "step_times.json", options.overrides))
    # Imported late: drawing needs a second to load.
    from lightning_base.claims.figure import draw

    draw(options.page.parent / "images" / "claims.png", studies)
    missing = fill(options.page, judged, TABLES, studies)
    for i, one in enumerate(judged, 1):
        title, verdict = (
            (one.title, one.verdict.value) if isinstance(one, Judged) else (one[0], f"not judged: {one[1]}")
        )
        print(f"{i}. {title}\n   {verdict}")
    for text in missing:
        print(f"not written: {text}", file=sys.stderr)
    print(f"\nclaims: {options.page}")
    return 0
