"""Runs the real program, as a user does, on a corpus small enough for tests."""

import csv
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import forks
import torch
from forks import REPOSITORY

TRAIN = REPOSITORY / "experiments" / "train.py"


def small_corpus(folder: Path) -> list[str]:
    """Writes some of the standard library as text files; gives the overrides that train on it in a second or two."""
    source = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted((source / "json").glob("*.py")) + sorted((source / "asyncio").glob("*.py")):
        (folder / f"{path.parent.name}_{path.stem}.txt").write_text(path.read_text() or "# empty\n")
    return [
        "debug=fast",
        "data=text",
        f"data.corpus.files={folder}/*.txt",
        f"data.cache_dir={folder}/cache",
        "data.vocab_size=512",
        "data.sequence_length=32",
        "data.global_batch=16",
        "data.routing_group=4",
        "data.validation_fraction=0.02",
        "trainer.accelerator=cpu",
        "trainer.threads=1",
        "trainer.detect_anomaly=false",
    ]


def command(*arguments: str) -> list[str]:
    """The arguments of Python with ``-m`` in front, where Hydra wants it."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    return [str(TRAIN), *flags, *(argument for argument in arguments if not argument.startswith("-"))]


def train(*arguments: str, timeout: float = 240, routers: Path | None = None) -> subprocess.CompletedProcess:
    """Runs ``experiments/train.py`` to its end, in a process that has imported torch and Lightning already.

    Args:
        arguments: as on the command line.
        timeout: in seconds.
        routers: a folder with modules that are to be in ``lightning_base.routing``, and with their ``router/*.yaml``.
    """
    return forks.run(started(arguments, routers), timeout=timeout)


def started(arguments: tuple[str, ...], routers: Path | None) -> list[str]:
    """The arguments of Python for ``train`` and ``start``."""
    if routers is None:
        return command(*arguments)
    added = f"import runpy, sys, lightning_base.routing as r; r.__path__.append({str(routers)!r}); del sys.argv[0]; "
    more = command(*arguments, f"hydra.searchpath=[file://{routers}]")
    return ["-c", added + "runpy.run_path(sys.argv[0], run_name='__main__')", *more]


def train_anew(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """The same as a user starts it: a new interpreter."""
    return subprocess.run(
        [sys.executable, *command(*arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        cwd=REPOSITORY,
    )


def start(*arguments: str, routers: Path | None = None) -> forks.Forked:
    """Begins ``experiments/train.py``; arguments are those of ``train``."""
    return forks.Forked(started(arguments, routers))


def environment() -> dict[str, str]:
    """This process's environment without what a test runner or a launcher may have left in it."""
    return forks.plain_environment()


def jobs(runs_dir: Path, name: str = "debug") -> dict[str, Path]:
    """The job folders of an experiment by name."""
    return {path.name: path for path in sorted((runs_dir / name).iterdir()) if path.is_dir()}


def only_job(runs_dir: Path, name: str = "debug") -> Path:
    """The folder of the one job there is."""
    (path,) = jobs(runs_dir, name).values()
    return path


def read(path: Path) -> dict:
    """A JSON file."""
    return json.loads(path.read_text())


def state(checkpoint: Path) -> dict[str, Any]:
    """What Lightning has put into a checkpoint."""
    found: dict[str, Any] = torch.load(checkpoint / "state.pt", weights_only=True)
    return found


def series(directory: Path, name: str) -> list[tuple[int, float]]:
    """One metric of a run: step and value."""
    with open(directory / "metrics.csv", newline="") as file:
        return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["name"] == name]


def processes_of(directory: Path) -> list[str]:
    """Command lines of living processes that mention a directory, or that came of a fork and should be gone."""
    found = [f"forked {process.pid}" for process in forks.descendants()]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(directory) in line and state != "Z" and process.name != str(os.getpid()):
            found.append(line)
    return found
