"""The program ``benchmark``."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_base.assignment import benchmark as assignment
from lightning_base.benchmark import data, harness, layer, scaling, solver, start, step, table
from lightning_base.benchmark.check import missing, regressions
from lightning_base.benchmark.machine import machine, machine_line
from lightning_base.benchmark.record import Form, Record
from lightning_base.program import rank as train

SUBJECTS = {
    "layer": layer,
    "step": step,
    "harness": harness,
    "start": start,
    "data": data,
    "scaling": scaling,
    "assignment": solver,
}
SHORTEST = ("layer", "harness")
DOCS = Path(__file__).resolve().parents[2] / "docs"
BASELINE = DOCS / "benchmark_baseline.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, shows and keeps; gives 1 if a check finds that something got worse."""
    given = parser().parse_args(arguments)
    if (given.check or given.subject == "page") and not BASELINE.exists():
        print(f"error: {BASELINE} is not there: --check and page work in the repository alone", file=sys.stderr)
        return 2
    if given.subject == "assignment" and given.figure is not None:
        from lightning_base.assignment.figure import draw

        draw(given.figure)
        return 0
    if given.subject == "assignment" and given.form == "full":
        assignment.print_growth()
    if given.subject == "page":
        from lightning_base.benchmark.page import write

        if given.json is None:
            raise SystemExit("error: say of which run: page --json FILE")
        others = [json.loads(path.read_text()) for path in given.also]
        write(DOCS / "performance.md", json.loads(given.json.read_text()), others)
        BASELINE.write_text(given.json.read_text())
        return 0
    result = run(given.subject, given.form, compiled=given.compile, keep_memory=given.keep_memory, sizes=given.sizes)
    print(table.whole(result["records"]))
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return compare(result, given.form) if given.check else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    asked = argparse.ArgumentParser(prog="benchmark", description="Measures what is promised.")
    asked.add_argument("subject", choices=["all", *SUBJECTS, "page"])
    forms = asked.add_mutually_exclusive_group()
    for form, tells in (
        ("quick", "the short form: all subjects in about ten minutes"),
        ("shortest", "less than a minute: only to see that nothing is grossly worse"),
    ):
        forms.add_argument(f"--{form}", dest="form", action="store_const", const=form, default="full", help=tells)
    asked.add_argument("--compile", action="store_true", help="layer and step: also through torch.compile")
    asked.add_argument(
        "--sizes", type=size, nargs="+", default=[], metavar="TxDxE", help="layer: these instead of those of the form"
    )
    asked.add_argument("--keep-memory", action="store_true", help="layer: freed memory is kept, as in training runs")
    asked.add_argument("--check", action="store_true", help=f"compare the ratios with {BASELINE.name}")
    asked.add_argument("--json", type=Path, help="keep the records here; `page` makes page and baseline from them")
    asked.add_argument(
        "--also", type=Path, nargs="+", default=[], help="page: the long form of layer, and step with --compile"
    )
    asked.add_argument("--figure", type=Path, help="assignment: draw its figure here, and measure nothing")
    return asked


def size(text: str) -> layer.Size:
    """``2048x128x8``: tokens, width and experts."""
    T, D, E = map(int, text.split("x"))
    if min(T, D, E) < 1 or T % E or T % 1024:
        raise ValueError(text)
    return T, D, E


def run(
    subject: str, form: Form, *, compiled: bool, keep_memory: bool = False, sizes: Sequence[layer.Size] = ()
) -> dict[str, Any]:
    """The records of one subject or of all, and of what machine they are."""
    names = [subject] if subject != "all" else list(SHORTEST) if form == "shortest" else list(SUBJECTS)
    before = machine()
    print(machine_line(before), file=sys.stderr)
    records: list[Record] = []
    began = time.time()
    for name in names:
        torch.set_num_threads(before["cores"])
        if name != "layer" or keep_memory:
            train.keep_freed_memory()  # as the program runs; a layer alone is measured as in anyone's program
        own = {"sizes": sizes} if name == "layer" and sizes else {}
        records += SUBJECTS[name].records(form, compiled, **own)
        print(f"{name}: {time.time() - began:.0f} s since the start", file=sys.stderr)
    after = {"load_average_after": machine()["load_average"]}
    return {
        "machine": {**before, **after},
        "form": form,
        "subjects": names,
        "keep_memory": keep_memory,
        "records": records,
    }


def compare(result: dict[str, Any], form: Form) -> int:
    """Says what is worse than in the baseline by more than noise; 1 if anything is."""
    baseline = json.loads(BASELINE.read_text())
    gone = [] if form == "shortest" else missing(result["records"], baseline["records"], result["subjects"])
    worse = regressions(result["records"], baseline["records"], gross=form == "shortest")
    print(f"\nbaseline: {machine_line(baseline['machine'])}")
    for name in gone:
        print(f"not measured any more: {name}")
    for change in worse:
        print(f"worse: {change}")
    if not worse:
        print("nothing is worse than the noise explains")
    return 1 if worse else 0
