"""The exact assignment's own benchmark as records like the others: over all instances of a size, and for the worst.

Shapes: N instances: every kind of scores with every variation of its parameters.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_base.assignment import benchmark as assignment
from lightning_base.benchmark.record import Form, Record, ratio_record

# The ratio, whether less is better, and the aim for the worst instance.
AIMS: dict[str, tuple[str, float | None]] = {
    "cold / argmax": ("lower", 6.0),
    "warm / argmax": ("lower", 3.0),
    "cold / floor": ("lower", 25.0),
    "warm / floor": ("lower", 12.0),
    "emd / cold": ("higher", 4.0),
    "auction / cold": ("higher", None),
    "flow / cold": ("higher", None),
}


def records(form: Form, compiled: bool) -> list[Record]:
    """The median over the instances of every size, with quartiles over instances; then the worst, against the aims.

    The worst of many is noise as much as it is the solver: it is shown and not compared with a baseline.
    """
    found = assignment.records(quick=form != "full")
    out: list[Record] = []
    for size in dict.fromkeys(one["size"] for one in found):
        own = [one for one in found if one["size"] == size]
        for name, (better, aim) in AIMS.items():
            known = [one for one in own if name in one["ratios"]]
            if known:
                out += of_size(size, name, known, better, aim)
    return out


def of_size(
    size: str, name: str, known: Sequence[dict[str, Any]], better: str, aim: float | None
) -> tuple[Record, Record]:
    """The record over all instances, and the one of the worst."""
    ratios_N = np.array([one["ratios"][name] for one in known])
    at = int(ratios_N.argmax() if better == "lower" else ratios_N.argmin())
    worst = f"{known[at]['kind']}, {known[at]['variation']}"
    everywhere = ratio_record("assignment", size, name, "median of instances", ratios_N, better=better)
    of_worst = ratio_record(
        "assignment", size, name, "worst instance", ratios_N[[at]], better=better, aim=aim, compared=False, note=worst
    )
    return everywhere, of_worst
