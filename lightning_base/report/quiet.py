"""Whether the machine was quiet: a fixed piece of work that every run has timed between its steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_base.report.fairness import Arm, execution

TOLERANCE = 0.1
ENOUGH = 4


@dataclass(frozen=True)
class Noise:
    """The reference kernel beside one arm: its median against the quietest arm's, and its spreads.

    Args:
        slower: how many times as long as beside the quietest arm.
        spread, least: quartile distance / median, here and beside the quietest arm.
        timings: how many there are beside this arm.
    """

    slower: float
    spread: float
    least: float
    timings: int

    @property
    def disturbed(self) -> bool:
        return self.slower > 1 + TOLERANCE or self.spread > self.least + TOLERANCE

    def scaled(self, speed: float) -> float | None:
        """What the speed might be on a quiet machine; None where it is as it was, or a guess from a few timings."""
        return speed * self.slower if self.disturbed and self.timings >= ENOUGH else None


def machine_noise(arms: Sequence[Arm]) -> list[Noise | None]:
    """The noise beside each arm, None where nothing was timed; arms that ran in other ways are held apart."""
    name = "machine/reference_ms"
    timed = [
        np.array([value for run in arm.runs if name in run.series for value in run.series[name].values]) for arm in arms
    ]
    found: list[Noise | None] = []
    for arm, mine in zip(arms, timed, strict=True):
        alike = [t for a, t in zip(arms, timed, strict=True) if len(t) and execution(a.first) == execution(arm.first)]
        if not len(mine):
            found.append(None)
            continue
        quietest = min(alike, key=lambda times: float(np.median(times)))
        slower = float(np.median(mine) / np.median(quietest))
        found.append(Noise(slower, spread(mine), spread(quietest), len(mine)))
    return found


def spread(times: np.ndarray) -> float:
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75))
    return float((high - low) / middle)
