"""The programs of this package: ``lightning-base train ...``, or the file of that name in ``experiments/``.

Everything is imported late: OpenMP reads its settings when torch is loaded.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version

from lightning_base import __version__

PROGRAMS = {
    "train": ("program.command", "trains one arm, or a sweep of arms: train experiment=compare seed=1,2,3"),
    "report": ("report.write", "tables and figures of what has run: report runs/compare"),
    "analysis": ("analysis.command", "what the experts of a finished run have learnt: analysis runs/compare/JOB"),
    "export": ("export", "the model of a run as model.safetensors with a JSON beside it: export runs/compare/JOB"),
    "check-router": (
        "check_router.command",
        "whether a router keeps what every router promises: check-router my_package.MyRouter",
    ),
    "benchmark": ("benchmark.command", "measures layer, step, harness, start, data and solver: benchmark all --quick"),
}


def run(name: str) -> int:
    """Runs a program on the arguments of this process; gives its exit code."""
    # Threads that sleep while they wait cost little on a quiet machine and save much on a busy one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if name == "train":
        from lightning_base.program.processes.forked import trains_elsewhere, warm_up

        if trains_elsewhere(sys.argv[1:]):
            # It imports the training code while this process imports Hydra and checks what it was given.
            warm_up("lightning_base.program.rank")
    if name == "check-router":
        from lightning_base.program.processes.forked import warm_up

        warm_up("lightning_base.check_router.command")
    main: Callable[[], int | None] = import_module(f"lightning_base.{PROGRAMS[name][0]}").main
    return main() or 0


def complete() -> int:
    """Answers what ``train -sc install=bash`` asks: a program to complete, or what Hydra knows of ``train``."""
    line, point = os.environ.get("COMP_LINE", ""), int(os.environ.get("COMP_POINT", "0"))
    # The last word before the cursor is the one to complete, which may not have begun.
    before = f"{line[:point]}|".split()[:-1]
    if len(before) < 2:
        print(" ".join(PROGRAMS))
    if before[1:2] != ["train"]:
        return 0  # nothing, for which the shell offers files
    # Hydra knows of no name between the command and its overrides.
    shorter = line.replace(" train", "", 1)
    os.environ |= {"COMP_LINE": shorter, "COMP_POINT": str(point - len(line) + len(shorter))}
    return run("train")


def main() -> int:
    """``lightning-base PROGRAM ...``; 2 if there is no such program."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in PROGRAMS:
        del sys.argv[1]
        return run(name)
    if name == "-sc":
        return complete()
    if name == "--version":
        versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "pytorch-lightning"))
        print(f"lightning-base {__version__} ({versions})")
        return 0
    if name not in ("-h", "--help"):
        from lightning_base.instantiation import did_you_mean

        print(f"error: {name} is no program of lightning-base{did_you_mean(name, PROGRAMS)}", file=sys.stderr)
        return 2
    print("usage: lightning-base PROGRAM [...], where PROGRAM is one of\n")
    for known, (_, tells) in PROGRAMS.items():
        print(f"  {known:<12} {tells}")
    print("\nlightning-base PROGRAM --help tells more, and lightning-base --version which this is.")
    return 0
