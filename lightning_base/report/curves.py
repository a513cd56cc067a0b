"""Quality at equal cost: the validation curve of a run, read between its points.

Shapes: S validations.
"""

from collections.abc import Sequence

import numpy as np

from lightning_base.report.fairness import Arm
from lightning_base.report.measures import Reader
from lightning_base.report.read import Run

CURVE = "validation/loss"
COSTS = ("steps", "FLOPs", "time")


def flops_until(run: Run, steps: np.ndarray) -> np.ndarray:
    """FLOPs spent until each step: steps * tokens per step * FLOPs per token."""
    return steps * (run.manifest["tokens"] / run.manifest["steps"]) * float(run.ledger["flops_per_token"])


def cost(run: Run, name: str) -> np.ndarray:
    """[S] what each validation had cost until then, in optimizer steps, FLOPs or seconds of training."""
    curve = run.series[CURVE]
    return {"steps": curve.steps, "FLOPs": flops_until(run, curve.steps), "time": curve.seconds}[name]


def budget(arms: Sequence[Arm], name: str) -> float | None:
    """What the run that spent least had spent at its last validation; None if no run was validated."""
    return min((float(cost(run, name)[-1]) for arm in arms for run in arm.runs if CURVE in run.series), default=None)


def loss_at(name: str, spent: float) -> Reader:
    """The validation loss when so much was spent, between two validations linearly; none before the first."""

    def read(run: Run) -> float | None:
        if CURVE not in run.series or spent < cost(run, name)[0]:
            return None
        return float(np.interp(spent, cost(run, name), run.series[CURVE].values))

    return read


def reached_by_all(arms: Sequence[Arm]) -> float | None:
    """The highest of the losses at the last validation: the lowest that every run has reached."""
    return max((run.series[CURVE].values[-1] for arm in arms for run in arm.runs if CURVE in run.series), default=None)


def seconds_to(loss: float) -> Reader:
    """Seconds of training until the curve first is at a loss or below, between two validations linearly.

    None for a run that never is, or that is below at its first validation already.
    """

    def read(run: Run) -> float | None:
        curve = run.series.get(CURVE)
        if curve is None or curve.values.min() > loss or curve.values[0] < loss:
            return None
        i = int(np.flatnonzero(curve.values <= loss)[0])
        part = slice(max(i - 1, 0), i + 1)
        return float(np.interp(-loss, -curve.values[part], curve.seconds[part]))

    return read
