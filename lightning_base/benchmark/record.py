"""What a benchmark leaves: one record per ratio, which is all that a check may compare.

Shapes: R rounds.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from lightning_base.benchmark.timing import spread

Record = dict[str, Any]
Form = Literal["full", "quick", "shortest"]


def ratio_record(
    subject: str,
    setting: str,
    arm: str,
    measure: str,
    ratios_R: Float64[ndarray, " R"],
    *,
    better: str = "lower",
    aim: float | None = None,
    absolute: tuple[float, str, float | None] | None = None,
    **more: Any,
) -> Record:
    """A median ratio with its quartiles.

    Args:
        subject: the benchmark, such as ``layer``.
        setting: sizes, such as ``2048 x 512 x 8``.
        arm: what was measured.
        measure: what the ratio is, such as ``forward+backward / floor``.
        ratios_R: one ratio per round; NaN where something sat out.
        better: ``lower`` or ``higher``.
        aim: the ratio that the project wants to reach, if it set one.
        absolute: where the aim is no ratio: the median, its unit, and the aim in that unit.
        more: further figures, such as milliseconds, which are shown and never compared.
    """
    ratio = spread(ratios_R)
    found = {
        "subject": subject,
        "setting": setting,
        "arm": arm,
        "measure": measure,
        "ratio": round(ratio.median, 4),
        "low": round(ratio.low, 4),
        "high": round(ratio.high, 4),
        "rounds": int((~np.isnan(ratios_R)).sum()),
        "better": better,
        "aim": aim,
    }
    if absolute is not None:
        value, unit, found["aim"] = absolute
        found |= {"value": round(value, 3), "unit": unit}
    return {**found, **more}


def key(record: Record) -> tuple[str, str, str, str]:
    """What makes two records the same measurement."""
    return record["subject"], record["setting"], record["arm"], record["measure"]


def reached(record: Record) -> bool | None:
    """Whether the aim was reached; None if there is none."""
    if record.get("aim") is None:
        return None
    value = float(record["value"] if "value" in record else record["ratio"])
    return value <= record["aim"] if record["better"] == "lower" else value >= record["aim"]
