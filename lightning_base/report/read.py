"""Reads run directories: what every job of an experiment left behind.

Shapes: S recorded steps, E experts or bins, R rows.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_base.program.run_directory import RunDirectory, read_json
from lightning_base.report.run import Counts, Layers, LeftOut, Run, Series, printable
from lightning_base.report.verify import problems


class ReportError(Exception):
    """There is nothing that could be reported; one sentence says why."""


@dataclass(frozen=True)
class Experiment:
    """The sound runs of one or several directories, in the order of their sweeps, and what else is there."""

    name: str
    runs: list[Run] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def read_experiment(*directories: Path) -> Experiment:
    """Reads experiments, or directories of single jobs.

    Runs whose files contradict each other are among what is left out, and a directory without a job.

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
            if isinstance(job, Run) and (wrong := problems(job)):
                job = LeftOut(path.name, label, "refused", "; ".join(wrong))
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
    for path in sorted(directory.glob("[!.]*/")):
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
        status = parsed(path / "status.json", read_json)
        state = str(status.get("state", "not started"))
        if state != "done":
            alive = state == "running" and job.is_alive()
            reason = str(status.get("error") or ("it is running" if alive else WHY.get(state, "it did not finish")))
            return LeftOut(path.name, label, state, reason, str(status.get("traceback") or ""))
        drops = path / "drop_by_position.csv"
        return Run(
            path=path,
            label=label,
            status=status,
            manifest=parsed(path / "manifest.json", read_json),
            config=parsed(job.config, read_yaml),
            overrides=list(map(str, read_yaml(job.config.with_name("overrides.yaml")) or [])),
            series=parsed(path / "metrics.csv", read_series),
            counts=parsed(path / "expert_load.csv", read_counts, "expert,demand,load"),
            drops=parsed(drops, read_counts, "bin,asked,dropped") if drops.exists() else {},
        )
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        return LeftOut(path.name, label, "refused", f"it cannot be read: {' '.join(str(error).split())}")


def parsed(path: Path, read: Callable[..., Any], *arguments: str) -> dict[str, Any]:
    """What a file holds.

    Raises:
        ValueError: that is no mapping; the sentence names the file.
    """
    try:
        found = read(path, *arguments)
    except (OSError, ValueError, csv.Error, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path.name} is missing or damaged ({why})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is missing, empty or no mapping")
    return found


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text()) if path.exists() else None


def read_series(path: Path) -> dict[str, Series]:
    """Every scalar of metrics.csv by name."""
    found = grouped(path, "step,seconds,name,value", "name")
    return {name: Series(rows[:, 0].astype(int), *rows[:, 1:].T) for (name,), rows in found.items()}


def read_counts(path: Path, columns: str = "expert,demand,load") -> Layers:
    """The counts of expert_load.csv or drop_by_position.csv; ``columns`` are a place and two counts.

    Raises:
        ValueError: a step lacks a place.
    """
    found: Layers = {}
    for (stage, layer), rows_R4 in grouped(path, f"step,stage,layer,{columns}", "stage", "layer").items():
        sorted_R4 = rows_R4[np.lexsort(rows_R4.T[1::-1])].astype(int)
        steps, places = np.unique(sorted_R4[:, 0]), np.unique(sorted_R4[:, 1])
        if sorted_R4[:, :2].tolist() != [[step, place] for step in steps for place in range(len(places))]:
            raise ValueError(f"it lacks rows of {stage}, {layer}")
        demand_SE, load_SE = sorted_R4[:, 2:].T.reshape(2, len(steps), len(places))
        found.setdefault(stage, {})[layer] = Counts(steps, demand_SE, load_SE)
    return found


def grouped(path: Path, columns: str, *names: str) -> dict[tuple[str, ...], np.ndarray]:
    """The numbers of a CSV file, [R, those of its columns], by what stands in the other columns, ``names``."""
    with open(path, newline="") as file:
        heading, *rows = list(csv.reader(file)) or [[]]
    if heading != columns.split(","):
        raise ValueError(f"it does not begin with the columns {columns}")
    found: dict[tuple[str, ...], list[list[float]]] = {}
    for row in rows:
        if len(row) != len(heading):
            raise ValueError("it has a row that is cut short")
        cells = dict(zip(heading, row, strict=True))
        found.setdefault(tuple(cells.pop(name) for name in names), []).append(list(map(float, cells.values())))
    return {key: np.array(numbers) for key, numbers in found.items()}
