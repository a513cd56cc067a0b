"""The figure of docs/performance.md: every layer over the dense one, and where the harness spends its time."""

from collections.abc import Sequence
from pathlib import Path

from lightning_base.benchmark.record import Record

MEASURE = "forward+backward / dense"
PARTS = 9


def draw(path: Path, records: Sequence[Record]) -> None:
    """Writes the figure as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    layers = [record for record in records if record["measure"] == MEASURE]
    arms = list(dict.fromkeys(record["arm"] for record in layers))
    settings = list(dict.fromkeys(record["setting"] for record in layers))
    height = 0.8 / max(len(settings), 1)
    for i, setting in enumerate(settings):
        own = {record["arm"]: record for record in layers if record["setting"] == setting}
        places = [arms.index(arm) + (i - (len(settings) - 1) / 2) * height for arm in own]
        ratios = [record["ratio"] for record in own.values()]
        errors = [
            [max(0.0, record["ratio"] - record["low"]) for record in own.values()],
            [max(0.0, record["high"] - record["ratio"]) for record in own.values()],
        ]
        left.barh(places, ratios, height, xerr=errors, label=setting, error_kw={"linewidth": 0.7})
    left.axvline(1, color="black", linewidth=0.8)
    left.set_yticks(range(len(arms)), arms, fontsize=8)
    left.invert_yaxis()
    left.set_xscale("log")
    ticks = (0.8, 1, 1.5, 2, 3, 5, 8)
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    left.set(xlabel="forward and backward, times the dense layer", title="layer (T x width x E)")
    if settings:
        left.legend(fontsize=7)

    harness = [record for record in records if record["subject"] == "harness" and record["arm"] != "whole step"]
    setting = harness[0]["setting"] if harness else ""
    parts = [record for record in harness if record["setting"] == setting and not record["arm"].startswith("work")]
    parts = parts[:PARTS]
    right.barh(range(len(parts)), [100 * record["ratio"] for record in parts], color="tab:blue")
    right.set_yticks(range(len(parts)), [record["arm"] for record in parts], fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="percent of a bare step", title=f"harness ({setting})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
