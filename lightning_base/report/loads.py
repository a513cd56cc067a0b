"""The figures of load and time: experts over layers and steps, drops by place, the parts of a step.

Shapes: S recorded steps, E experts, N bins.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_base.report.drawing import Picture, Style, heatmap, legend_columns, panels, render
from lightning_base.report.fairness import Arm, stage_of
from lightning_base.report.measures import PHASES, logged, mean
from lightning_base.report.read import Run
from lightning_base.report.words import WORDS

CAPTIONS = WORDS["captions"]


def load_bars(arms: Sequence[Arm], looks: Sequence[Style]) -> Iterator[Picture]:
    """Load of each expert in the final evaluation: a row per arm and evaluation mode, a column per layer."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for arm, look in zip(arms, looks, strict=True):
        for mode in arm.modes if arm.sparse else []:
            stage = f"{stage_of(arm, mode)}_pass"
            label = f"{arm.label}, {mode}" if len(arm.modes) > 1 else arm.label
            shares = {
                layer: np.mean(
                    [relative(run, stage, layer) for run in arm.runs if layer in run.counts.get(stage, {})], 0
                )
                for layer in arm.first.counts.get(stage, {})
            }
            rows += [(label, {layer: (found, look.color) for layer, found in shares.items()})] * bool(shares)
    for part, figure, drawn in panels(rows, sharey=True):
        for axes, ((demand_E, load_E), color) in drawn:
            experts = np.arange(len(load_E))
            axes.bar(experts, load_E, color=color, width=0.8)
            axes.bar(experts, demand_E - load_E, bottom=load_E, color="white", edgecolor=color, width=0.75)
            axes.axhline(1, color="#444444", lw=1)
            axes.grid(axis="x", visible=False)
            axes.set_xticks(experts if len(experts) <= 8 else experts[:: len(experts) // 8])
        figure.supxlabel("expert", fontsize=11)
        figure.supylabel("tokens / even share", fontsize=11)
        title = f"Load per expert in evaluation{part.replace('_', ' ')}"
        yield render(f"load_bars{part}", title, CAPTIONS["load_bars"], figure)


def load_heatmaps(arms: Sequence[Arm]) -> Iterator[Picture]:
    """Demand over training: a row per arm, a column per layer, experts over logged steps."""
    found = [(arm.label, arm.first.counts.get("train_step", {})) for arm in arms if arm.sparse]
    rows = [(label, layers) for label, layers in found if layers]
    seed = f" Seed {arms[0].seeds[0]} of {len(arms[0].seeds)}." if len(arms[0].seeds) > 1 else ""
    for part, figure, drawn in panels(rows):
        for axes, counts in drawn:
            image = heatmap(axes, (counts.demand / np.maximum(counts.demand.mean(1, keepdims=True), 1e-9)).T)
            shown = np.unique(np.linspace(0, len(counts.steps) - 1, min(5, len(counts.steps))).astype(int))
            axes.set_xticks(shown, [str(counts.steps[i]) for i in shown])
            axes.set_yticks(sorted({0, counts.demand.shape[1] - 1}))
        figure.supxlabel("step", fontsize=11)
        figure.supylabel("expert", fontsize=11)
        shrink = min(1.0, 2 / len(rows))
        figure.colorbar(image, ax=figure.axes, label="demand / even share", extend="max", shrink=shrink)
        title = f"Demand per expert over training{part.replace('_', ' ')}"
        yield render(f"load_over_time{part}", title, CAPTIONS["load_over_time"] + seed, figure)


def drops_by_position(arms: Sequence[Arm], looks: Sequence[Style]) -> Iterator[Picture]:
    """Drop rate against the place in the routing group, in training and in evaluation, for arms that drop."""
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    dropping: dict[str, Any] = {}
    for axes, stage, title in zip(grid, ("train_step", "final_pass"), ("training", "evaluation"), strict=True):
        for arm, look in zip(arms, looks, strict=True):
            counts = [layer for run in arm.runs for layer in run.drops.get(stage, {}).values()]
            asked_N, dropped_N = np.sum(counts, 0) if counts else np.zeros((2, 1))
            if dropped_N.any():
                x, share_N = (np.arange(len(asked_N)) + 0.5) / len(asked_N), dropped_N / np.maximum(asked_N, 1)
                dropping[arm.label] = axes.plot(100 * x, 100 * share_N, ms=4, **look.of_line)[0]
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("place in the routing group [%]")
        axes.set_ylim(bottom=0)
    if dropping:
        grid[0].set_ylabel("dropped [%]")
        across = legend_columns([arm.label for arm in arms])
        figure.legend(dropping.values(), dropping, loc="outside lower center", frameon=False, ncols=across)
        yield render("drops_by_position", "Drops by position", CAPTIONS["drops_by_position"], figure)


def time_bars(arms: Sequence[Arm]) -> Iterator[Picture]:
    """The parts of a training step in milliseconds: a bar per arm."""
    times = {
        arm.label: [1e3 * (mean(arm, logged(f"train_time/{phase}", 1)) or 0.0) for phase in PHASES] for arm in arms
    }
    shown = {label: taken for label, taken in times.items() if any(taken)}
    if not shown:
        return
    figure = Figure(figsize=(7.6, 1.4 + 0.34 * len(shown)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(shown))
    for (phase, color), width in zip(PHASES.items(), np.array(list(shown.values())).T, strict=True):
        axes.barh(list(shown), width, left=left, color=color, label=phase.replace("_", " "), height=0.7)
        left += width
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time of a training step [ms]")
    figure.legend(loc="outside lower center", frameon=False, ncols=4, fontsize=10)
    yield render("step_time", "Where the time of a step goes", CAPTIONS["step_time"], figure)


def relative(run: Run, stage: str, layer: str) -> np.ndarray:
    """Demand and load of the last pass relative to an even share of the demand, [2, E]."""
    counts = run.counts[stage][layer]
    both_2E = np.stack([counts.demand[-1], counts.load[-1]]).astype(float)
    relative_2E: np.ndarray = both_2E / max(both_2E[0].mean(), 1e-9)
    return relative_2E
