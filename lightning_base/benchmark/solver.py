"""The exact assignment's own benchmark as records like the others: over all instances of a size, and for the worst.

Shapes: N instances: every kind of scores with every variation of its parameters.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_base.assignment import balanced_assignment
from lightning_base.assignment import benchmark as assignment
from lightning_base.assignment.examples import VARIATIONS
from lightning_base.assignment.profile import profile
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
REPEATS = "Zipf repeats, bf16"
REPEATS_AIM = 35.0  # cold / floor, where tokens repeat
PROFILED = "8192 x 64"


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
            if known and name == "cold / floor":
                by_kind = [[one for one in known if (one["kind"] == REPEATS) == repeats] for repeats in (False, True)]
                everywhere, _ = of_size(size, name, known, better, aim)
                out += [everywhere, of_size(size, name, by_kind[0], better, aim)[1]]
                out.append(of_size(size, f"{name}, repeated tokens", by_kind[1], better, REPEATS_AIM, name)[1])
            elif known:
                out += of_size(size, name, known, better, aim)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if profiled := [one for one in found if one["size"] == PROFILED]:
        out += profiles(profiled)
    torch.set_num_threads(threads)
    return out


def of_size(
    size: str, arm: str, known: Sequence[dict[str, Any]], better: str, aim: float | None, ratio: str | None = None
) -> tuple[Record, Record]:
    """The record over all instances, and the one of the worst; ``ratio`` if it is named otherwise than the arm."""
    ratios_N = np.array([one["ratios"][ratio or arm] for one in known])
    at = int(ratios_N.argmax() if better == "lower" else ratios_N.argmin())
    worst = f"{known[at]['kind']}, {known[at]['variation']}"
    everywhere = ratio_record("assignment", size, arm, "median of instances", ratios_N, better=better)
    of_worst = ratio_record(
        "assignment", size, arm, "worst instance", ratios_N[[at]], better=better, aim=aim, compared=False, note=worst
    )
    return everywhere, of_worst


def profiles(found: Sequence[dict[str, Any]]) -> list[Record]:
    """Cold and warm solves of the instances where they take longest beside ``argmax(1)``: phases, steps, paths."""
    out = []
    for worst in ("cold / argmax", "warm / argmax"):
        one = max(found, key=lambda one: one["ratios"][worst])
        T, E = map(int, one["size"].split(" x "))
        both = VARIATIONS[one["kind"]][one["variation"]](2 * T, E, torch.Generator().manual_seed(T + E))
        starts = {"cold": None, "warm": balanced_assignment(both[:T]).prices}
        setting = f"{one['size']}, worst {worst}: {one['kind']}, {one['variation']}"
        for arm, start in starts.items():
            seen = profile(both[T:].clone(), start)
            counts = {
                name: getattr(seen, name)
                for name in ("newton_steps", "too_many", "rounds_of_paths", "searches", "paths", "tokens_moved")
            }
            for phase, ms in seen.ms.items():
                share = np.array([ms / one["ms"]["argmax"]])
                out.append(
                    ratio_record("worst_solve", setting, arm, f"{phase} / argmax", share, compared=False, **counts)
                )
    return out
