"""Reads run directories: what every job of an experiment left behind.

Shapes: S recorded steps, E experts.
"""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_base.run_directory import RunDirectory, read_json


class ReportError(Exception):
    """There is nothing that could be reported; one sentence says why."""


class UnreadableError(Exception):
    """A file of a run that cannot be used; one sentence names it."""


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
    """One finished job: its manifest, its configuration, its scalars by name, its counts by stage and layer."""

    path: Path
    label: str
    status: dict[str, Any]
    manifest: dict[str, Any]
    config: dict[str, Any]
    overrides: list[str]
    series: dict[str, Series]
    counts: dict[str, dict[str, Counts]]
    drops: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Assignments asked for and dropped by place in the routing group, [2, N bins], by stage and layer."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def ledger(self) -> dict[str, Any]:
        found: dict[str, Any] = self.manifest["ledger"]
        return found

    @property
    def seed(self) -> int:
        return int(self.manifest["seed"])

    def last(self, name: str) -> float | None:
        """The last value of a scalar, or None if it was never written."""
        series = self.series.get(name)
        return None if series is None else float(series.values[-1])

    def mean(self, name: str) -> float | None:
        """The mean of a scalar over all recorded steps, or None."""
        series = self.series.get(name)
        return None if series is None else float(series.values.mean())


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
    """Reads experiment directories, or directories of single jobs.

    Raises:
        ReportError: one of them is not there, or holds no job.
    """
    found = Experiment(" + ".join(directory.resolve().name for directory in directories))
    for directory in directories:
        if not directory.is_dir():
            raise ReportError(f"{directory} is not a directory: give one that runs have been written to")
        jobs = list_jobs(directory)
        if not jobs:
            raise ReportError(f"{directory} holds no run: give a directory whose folders have a status.json")
        for path, label in jobs:
            job = read_job(path, label)
            (found.runs if isinstance(job, Run) else found.left_out).append(job)  # type: ignore[arg-type]
    return found


def list_jobs(directory: Path) -> list[tuple[Path, str]]:
    """The jobs of an experiment with their labels: those of its sweep in order, then any others by name."""
    if (directory / "status.json").exists():
        return [(directory, directory.resolve().name)]
    try:
        labels = read_json(directory / "sweep.json").get("jobs", {})
        swept = {str(name): printable(str(label)) for name, label in labels.items()}
    except (ValueError, AttributeError, OSError) as error:
        raise ReportError(f"{directory / 'sweep.json'} cannot be read ({error}): repair or remove it") from error
    others = sorted(
        path.name for path in directory.iterdir() if path.name not in swept and (path / "status.json").exists()
    )
    # A name in sweep.json is a folder right here, whatever a hand may have written into the file.
    return [(directory / Path(name).name, swept.get(name, name)) for name in [*swept, *others]]


def read_job(path: Path, label: str) -> Run | LeftOut:
    """A finished job, or why it is none."""
    job = RunDirectory(path)
    try:
        status = job.status()
        state = str(status.get("state", "not started"))
        if state != "done":
            reason = str(status.get("error") or WHY.get(state, "it did not finish"))
            return LeftOut(path.name, label, state, reason, str(status.get("traceback") or ""))
        return Run(
            path=path,
            label=label,
            status=status,
            manifest=required_json(path / "manifest.json"),
            config=read_yaml(job.config),
            overrides=read_overrides(job.config.with_name("overrides.yaml")),
            series=read_series(path / "metrics.csv"),
            counts=read_counts(path / "expert_load.csv"),
            drops=read_drops(path / "drop_by_position.csv"),
        )
    except UnreadableError as error:
        return LeftOut(path.name, label, "refused", str(error))
    except (OSError, ValueError) as error:
        return LeftOut(path.name, label, "refused", f"it cannot be read: {error}")


def printable(text: str) -> str:
    """Without control characters: what a file holds must not move a terminal's cursor, and no font can draw them."""
    return "".join(c for c in text if c.isprintable() or c == "\n")


WHY = {
    "running": "it is running, or was killed without a word",
    "preempted": "it was stopped and can be resumed",
    "not started": "there is no status.json",
}


def required_json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (json.JSONDecodeError, ValueError) as error:
        raise UnreadableError(f"{path.name} is not a JSON object ({error})") from error
    if not found:
        raise UnreadableError(f"{path.name} is missing or empty")
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UnreadableError(".hydra/config.yaml is missing")
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UnreadableError(".hydra/config.yaml is not YAML") from error
    if not isinstance(found, dict):
        raise UnreadableError(".hydra/config.yaml does not hold a mapping")
    return found


def read_overrides(path: Path) -> list[str]:
    """What was typed for this job; nothing depends on it, so a file that is not there is no mistake."""
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):
        return []
    return [str(item) for item in found] if isinstance(found, list) else []


def read_series(path: Path) -> dict[str, Series]:
    """Every scalar of metrics.csv by name."""
    rows: dict[str, list[tuple[int, float, float]]] = {}
    for row in read_rows(path, ("step", "seconds", "name", "value")):
        rows.setdefault(row[2], []).append((int(row[0]), float(row[1]), float(row[3])))
    return {name: Series(*(np.array(column) for column in zip(*found, strict=True))) for name, found in rows.items()}


def read_counts(path: Path) -> dict[str, dict[str, Counts]]:
    """The counts of expert_load.csv by stage and layer."""
    cells: dict[tuple[str, str], dict[int, dict[int, tuple[int, int]]]] = {}
    for step, stage, layer, expert, demand, load in read_rows(
        path, ("step", "stage", "layer", "expert", "demand", "load")
    ):
        by_step = cells.setdefault((stage, layer), {})
        by_step.setdefault(int(step), {})[int(expert)] = (int(demand), int(load))
    found: dict[str, dict[str, Counts]] = {}
    for (stage, layer), by_step in cells.items():
        widths = {len(experts) for experts in by_step.values()}
        if len(widths) != 1 or any(sorted(experts) != list(range(len(experts))) for experts in by_step.values()):
            raise UnreadableError(f"expert_load.csv lacks rows of {stage}, {layer}")
        table_S2E = np.array([[by_step[s][e] for e in range(max(widths))] for s in by_step])
        found.setdefault(stage, {})[layer] = Counts(np.array(list(by_step)), table_S2E[..., 0], table_S2E[..., 1])
    return found


def read_drops(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The counts of drop_by_position.csv, summed over steps, by stage and layer; {} if the file is not there."""
    if not path.exists():
        return {}
    cells: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for _, stage, layer, place, asked, dropped in read_rows(
        path, ("step", "stage", "layer", "bin", "asked", "dropped")
    ):
        by_bin = cells.setdefault((stage, layer), {})
        by_bin[int(place)] = by_bin.get(int(place), 0) + np.array([int(asked), int(dropped)])
    found: dict[str, dict[str, np.ndarray]] = {}
    for (stage, layer), by_bin in cells.items():
        found.setdefault(stage, {})[layer] = np.stack([by_bin[place] for place in sorted(by_bin)], 1)
    return found


def read_rows(path: Path, columns: tuple[str, ...]) -> list[list[str]]:
    try:
        with open(path, newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnreadableError(f"{path.name} cannot be read ({type(error).__name__})") from error
    if not rows or tuple(rows[0]) != columns:
        raise UnreadableError(f"{path.name} does not begin with the columns {','.join(columns)}")
    if any(len(row) != len(columns) for row in rows):
        raise UnreadableError(f"{path.name} has a row that is cut short")
    return rows[1:]
