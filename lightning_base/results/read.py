"""Reads run directories: what a job has left behind.

Shapes: S recorded steps, E experts, N bins, R rows.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_base.program.run_directory import RunDirectory, read_json, under


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
    """Assignments of one layer by expert: ``steps`` [S], ``demand`` and ``load`` [S, E].

    By place in the routing group they are those asked for and those dropped, [S, N].
    """

    steps: np.ndarray
    demand: np.ndarray
    load: np.ndarray


# By stage and layer.
Layers = dict[str, dict[str, Counts]]


@dataclass(frozen=True, eq=False)
class Run:
    """One finished job: its manifest, its configuration, its scalars by name, its counts by stage and layer.

    ``drops`` are counts by place in the routing group.
    """

    path: Path
    label: str
    status: dict[str, Any]
    manifest: dict[str, Any]
    config: dict[str, Any]
    overrides: list[str]
    series: dict[str, Series]
    counts: Layers
    drops: Layers

    @property
    def ledger(self) -> dict[str, Any]:
        return self.manifest["ledger"]

    @property
    def seed(self) -> int:
        return int(self.manifest["seed"])

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The configuration and the manifest by dotted key, the configuration without one in front."""
        return flatten(self.config) | flatten({k: v for k, v in self.manifest.items() if k != "config"})

    def chosen(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The fields under some names."""
        return {key: value for key, value in self.fields.items() if under(key, names)}

    def values(self, name: str) -> list[float]:
        """All of a scalar, [] if it was never written."""
        return list(map(float, self.series[name].values)) if name in self.series else []

    def last(self, name: str) -> float | None:
        return self.values(name)[-1] if name in self.series else None

    def number(self, name: str, after: int = 0) -> float | None:
        """The mean of a scalar over its steps, or those ``after`` some if there are more; or a field; or None."""
        if values := self.values(name):
            return float(np.mean(values[after:] or values))
        value = self.fields.get(name)
        return None if value is None else float(value)


@dataclass(frozen=True)
class LeftOut:
    """A job that is in no table: its state, and why."""

    name: str
    label: str
    state: str
    reason: str
    details: str = ""


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
