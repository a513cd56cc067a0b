"""A run as its directory tells of it, and a job that is none.

Shapes: S recorded steps, E experts, N bins.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np


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


@dataclass(frozen=True)
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
