"""Reads run directories: what every job of an experiment left behind.

Shapes: S recorded steps, E experts, N bins, R rows.
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_base.program.run_directory import RunDirectory, read_json


class ReportError(Exception):
    """There is nothing that could be reported; one sentence says why."""


@dataclass(frozen=True)
class Series:
    """One scalar over a run: ``steps`` [S], ``seconds`` of training until then [S], ``values`` [S]."""

    steps: np.ndarray
    seconds: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Counts:
    """Assignments per expert of one layer: ``steps`` [S], ``demand`` and ``load`` [S, E]."""

    steps: np.ndarray
    demand: np.ndarray
    load: np.ndarray


@dataclass(frozen=True)
class Run:
    """One finished job: its manifest, its configuration, its scalars by name, its counts by stage and layer.

    ``drops`` are assignments asked for and dropped by place in the routing group, [2, N], by stage and layer.
    """

    path: Path
    label: str
    status: dict[str, Any]
    manifest: dict[str, Any]
    config: dict[str, Any]
    overrides: list[str]
    series: dict[str, Series]
    counts: dict[str, dict[str, Counts]]
    drops: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def ledger(self) -> dict[str, Any]:
        found: dict[str, Any] = self.manifest["ledger"]
        return found

    @property
    def certificate(self) -> dict[str, Any]:
        """What the run was: the manifest without what it was told, what it spent and what came out."""
        return {key: value for key, value in self.manifest.items() if key not in ("config", "ledger", "result")}

    @property
    def seed(self) -> int:
        return int(self.manifest["seed"])

    def last(self, name: str) -> float | None:
        """The last value of a scalar, or None if it was never written."""
        return float(self.series[name].values[-1]) if name in self.series else None

    def mean(self, name: str, after: int = 0) -> float | None:
        """The mean of a scalar over all recorded steps, or those ``after`` some, if there are more; or None."""
        values = self.series[name].values if name in self.series else np.array([])
        return float(values[after if len(values) > after else 0 :].mean()) if len(values) else None


@dataclass(frozen=True)
class LeftOut:
    """A job that is in no table: its state, and why."""

    name: str
    label: str
    state: str
    reason: str
    details: str = ""


@dataclass(frozen=True)
class Experiment:
    """The jobs of one or several directories, in the order of their sweeps."""

    name: str
    runs: list[Run] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def read_experiment(*directories: Path) -> Experiment:
    """Reads experiment directories, or directories of single jobs; one without a job is among what is left out.

    Raises:
        ReportError: one of them is not there.
    """
    found = Experiment(" + ".join(directory.resolve().name for directory in directories))
    for directory in dict.fromkeys(directories):
        if not directory.is_dir():
            raise ReportError(f"{directory} is not a directory: give one that runs have been written to")
        jobs = list_jobs(directory, found.left_out)
        for path, label in jobs.items():
            job = read_job(path, label)
            found.runs.append(job) if isinstance(job, Run) else found.left_out.append(job)
        if not jobs:
            deeper = sorted({path.parent.parent.name for path in directory.glob("*/*/status.json")})
            hint = f"its folders {', '.join(deeper[:8])} do" if deeper else "runs are folders with a status.json"
            found.left_out.append(LeftOut(directory.name, str(directory), "empty", f"it holds no run; {hint}"))
    return found


def list_jobs(directory: Path, left_out: list[LeftOut]) -> dict[Path, str]:
    """The jobs of an experiment with their labels: those of its sweep in order, then any others by name."""
    if (directory / "status.json").exists():
        return {directory: directory.resolve().name}
    labels: dict[str, str] = {}
    try:
        # A name in sweep.json is a folder right here, whatever a hand may have written into the file.
        sweep = read_json(directory / "sweep.json")
        jobs = {**sweep.get("earlier", {}), **sweep.get("jobs", {})}
        labels = {Path(str(name)).name: printable(str(label)) for name, label in jobs.items()}
    except (ValueError, TypeError, OSError) as error:
        left_out.append(LeftOut("sweep.json", "sweep.json", "unreadable", f"runs have the names of folders: {error}"))
    for path in sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")):
        # A job that was killed before it could say anything has its configuration.
        if any((path / name).exists() for name in ("status.json", "manifest.json", ".hydra/config.yaml")):
            labels.setdefault(path.name, path.name)
    return {directory / name: label for name, label in labels.items()}


WHY = {
    "running": "it is running on another machine, or was killed without a word",
    "preempted": "it was stopped and can be resumed",
    "not started": "there is no status.json",
}


def read_job(path: Path, label: str) -> Run | LeftOut:
    """A finished job, or why it is none."""
    job = RunDirectory(path)
    try:
        status = job.status()
        state = str(status.get("state", "not started"))
        if state != "done":
            alive = state == "running" and job.is_alive()
            reason = str(status.get("error") or ("it is running" if alive else WHY.get(state, "it did not finish")))
            return LeftOut(path.name, label, state, reason, str(status.get("traceback") or ""))
        return Run(
            path=path,
            label=label,
            status=status,
            manifest=required(path / "manifest.json", read_json),
            config=required(job.config, read_yaml),
            overrides=[str(item) for item in read_yaml(job.config.with_name("overrides.yaml")) or []],
            series=read_series(path / "metrics.csv"),
            counts=read_counts(path / "expert_load.csv"),
            drops=read_drops(path / "drop_by_position.csv"),
        )
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        return LeftOut(path.name, label, "refused", f"it cannot be read: {' '.join(str(error).split())}")


def required(path: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
    """A mapping from a file of JSON or YAML."""
    try:
        found = read(path)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error
    if not found or not isinstance(found, dict):
        raise ValueError(f"{path.name} is missing, empty or no mapping")
    return found


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text()) if path.exists() else None


def read_series(path: Path) -> dict[str, Series]:
    """Every scalar of metrics.csv by name."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for step, seconds, name, value in read_rows(path, "step,seconds,name,value"):
        found.setdefault(name, []).append((int(step), float(seconds), float(value)))
    return {name: Series(*map(np.array, zip(*rows, strict=True))) for name, rows in found.items()}


def read_counts(path: Path) -> dict[str, dict[str, Counts]]:
    """The counts of expert_load.csv by stage and layer."""
    found: dict[str, dict[str, Counts]] = {}
    for stage, layer, rows_R4 in grouped(path, "step,stage,layer,expert,demand,load"):
        steps, experts = np.unique(rows_R4[:, 0]), np.unique(rows_R4[:, 1])
        if [tuple(row) for row in rows_R4[:, :2].tolist()] != [(s, e) for s in steps for e in range(len(experts))]:
            raise ValueError(f"{path.name} lacks rows of {stage}, {layer}")
        demand_SE, load_SE = rows_R4[:, 2:].T.reshape(2, len(steps), len(experts))
        found.setdefault(stage, {})[layer] = Counts(steps, demand_SE, load_SE)
    return found


def read_drops(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The counts of drop_by_position.csv, summed over steps, by stage and layer; {} if the file is not there."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for stage, layer, rows_R4 in grouped(path, "step,stage,layer,bin,asked,dropped") if path.exists() else ():
        sums = [rows_R4[rows_R4[:, 1] == place, 2:].sum(0) for place in np.unique(rows_R4[:, 1])]
        found.setdefault(stage, {})[layer] = np.stack(sums, 1)
    return found


def grouped(path: Path, columns: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """The whole numbers of a file by stage and layer, each group in the order of steps and places."""
    found: dict[tuple[str, str], list[list[int]]] = {}
    for step, stage, layer, *numbers in read_rows(path, columns):
        found.setdefault((stage, layer), []).append([int(step), *map(int, numbers)])
    for (stage, layer), rows in found.items():
        yield stage, layer, np.array(sorted(rows))


def read_rows(path: Path, columns: str) -> list[list[str]]:
    try:
        with open(path, newline="") as file:
            heading, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path.name} is missing or damaged ({type(error).__name__})") from error
    if heading != columns.split(","):
        raise ValueError(f"{path.name} does not begin with the columns {columns}")
    if any(len(row) != len(heading) for row in rows):
        raise ValueError(f"{path.name} has a row that is cut short")
    return rows


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested configuration as dotted keys with plain values; an empty mapping leaves no key.

    >>> flatten({"trainer": {"devices": 1}, "seed": 3})
    {'trainer.devices': 1, 'seed': 3}
    """
    if not isinstance(node, dict):
        return {prefix: node}
    dotted = f"{prefix}." if prefix else ""
    return {name: leaf for key, value in node.items() for name, leaf in flatten(value, f"{dotted}{key}").items()}


def printable(text: str) -> str:
    """Without control characters: what a file holds must not move a terminal's cursor, and no font can draw them."""
    return "".join(c for c in text if c.isprintable() or c == "\n")
