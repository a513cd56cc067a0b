"""How fast arms trained, and whether that compares: other ways of running, a busy machine, runs side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_base.report.fairness import Arm, execution
from lightning_base.report.read import Run

TOLERANCE = 0.1
ENOUGH = 4


def quartiles(runs: Sequence[Run]) -> list[float]:
    """Of tokens per second over the log windows after the first, which holds the warm-up; [] if there is none."""
    name = "train/tokens_per_second"
    found = [pace for run in runs if name in run.series for pace in run.series[name].values[1:]]
    return np.quantile(found, (0.25, 0.5, 0.75)).tolist() if found else []


def speed(run: Run) -> float | None:
    return dict(enumerate(quartiles([run]))).get(1)


@dataclass(frozen=True)
class Noise:
    """A fixed piece of work was timed between steps: how many times ``slower`` it was than beside the quietest arm.

    ``spread`` and ``least`` are quartile distance / median of the ``timings``, here and beside the quietest arm.
    """

    slower: float = 1.0
    spread: float = 0.0
    least: float = 0.0
    timings: int = 0

    @property
    def disturbed(self) -> bool:
        return self.slower > 1 + TOLERANCE or self.spread > self.least + TOLERANCE

    def scaled(self, arm: Arm) -> float | None:
        """What the speed might be on a quiet machine; None where it is as it was, or a guess from a few timings."""
        pace = quartiles(arm.runs)
        return pace[1] * self.slower if pace and self.disturbed and self.timings >= ENOUGH else None


def machine_noise(arms: Sequence[Arm]) -> list[Noise]:
    """The noise beside each arm, none where nothing was timed; arms that ran in other ways are held apart."""
    name = "machine/reference_ms"
    times = [[value for run in arm.runs if name in run.series for value in run.series[name].values] for arm in arms]
    found = []
    for arm, mine in zip(arms, times, strict=True):
        alike = [t for a, t in zip(arms, times, strict=True) if t and execution(a.first) == execution(arm.first)]
        quietest = min(alike, key=np.median, default=[])
        slower = float(np.median(mine) / np.median(quietest)) if mine else 1.0
        found.append(Noise(slower, spread(mine), spread(quietest), len(mine)) if mine else Noise())
    return found


def spread(times: Sequence[float]) -> float:
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75))
    return float((high - low) / middle)


def side_by_side(arms: Sequence[Arm]) -> list[Arm]:
    """The arms of which a run was under way on the same machine while another of these runs was."""
    runs = [run for arm in arms for run in arm.runs if {"host", "started", "updated"} <= set(run.status)]

    def beside(one: Run, other: Run) -> bool:
        mine, theirs = one.status, other.status
        together = max(mine["started"], theirs["started"]) < min(mine["updated"], theirs["updated"])
        return one is not other and mine["host"] == theirs["host"] and together

    return [arm for arm in arms if any(beside(run, other) for run in arm.runs if run in runs for other in runs)]
