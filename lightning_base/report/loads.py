"""The figures of load and time: experts over layers and steps, drops by place, the parts of a step.

Shapes: S recorded steps, E experts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_base.report.colors import Style
from lightning_base.report.drawing import chunks, legend_columns, panel, render
from lightning_base.report.fairness import Arm, stage_of
from lightning_base.report.measures import mean, steady
from lightning_base.report.picture import Picture
from lightning_base.report.read import Run


def load_bars(arms: Sequence[Arm], labels: Sequence[str], looks: Sequence[Style]) -> Iterator[Picture]:
    """Load of each expert in the final evaluation: a row per arm and evaluation mode, a column per layer."""
    rows = [
        (f"{label}, {mode}" if len(arm.modes) > 1 else label, look, stage, arm)
        for label, look, arm in zip(labels, looks, arms, strict=True)
        for mode in arm.modes
        if arm.sparse and (stage := f"{stage_of(arm, mode)}_pass") in arm.first.counts
    ]
    for part, layers in chunks(layer_names([arm for *_, arm in rows])):
        figure = Figure(figsize=(1.6 + 3 * len(layers), 0.7 + 1.55 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), len(layers), squeeze=False, sharey=True)
        for line, (label, look, stage, arm) in zip(grid, rows, strict=True):
            for axes, layer in zip(line, layers, strict=True):
                shares = [relative(run, stage, layer) for run in arm.runs if layer in run.counts.get(stage, {})]
                if not shares:
                    axes.set_axis_off()
                    continue
                demand_E, load_E = np.mean(shares, 0)
                experts = np.arange(len(load_E))
                axes.bar(experts, load_E, color=look.color, width=0.8)
                axes.bar(experts, demand_E - load_E, bottom=load_E, color="white", edgecolor=look.color, width=0.75)
                axes.axhline(1, color="#444444", lw=1)
                axes.grid(axis="x", visible=False)
                axes.set_xticks(experts if len(experts) <= 8 else experts[:: len(experts) // 8])
                axes.set_title(panel(label, layer), fontsize=10, loc="left")
        figure.supxlabel("expert", fontsize=11)
        figure.supylabel("tokens / even share", fontsize=11)
        yield render(f"load_bars{part}", f"Load per expert in evaluation{part.replace('_', ' ')}", BARS_CAPTION, figure)


BARS_CAPTION = (
    "Tokens of the whole validation text that each expert computed, relative to an even share (the line at 1). An "
    "empty piece on top of a bar is demand that was dropped. Arms with a single expert are not shown."
)


def load_heatmaps(arms: Sequence[Arm], labels: Sequence[str]) -> Iterator[Picture]:
    """Demand over training: a row per arm, a column per layer, experts over logged steps."""
    rows = [
        (label, arm)
        for label, arm in zip(labels, arms, strict=True)
        if arm.sparse and arm.first.counts.get("train_step")
    ]
    seed = f" Seed {arms[0].seeds[0]} of {len(arms[0].seeds)}." if len(arms[0].seeds) > 1 else ""
    for part, layers in chunks(layer_names([arm for _, arm in rows])):
        figure = Figure(figsize=(2.2 + 3 * len(layers), 0.9 + 1.6 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), len(layers), squeeze=False)
        image = None
        for line, (label, arm) in zip(grid, rows, strict=True):
            for axes, layer in zip(line, layers, strict=True):
                counts = arm.first.counts["train_step"].get(layer)
                if counts is None:
                    axes.set_axis_off()
                    continue
                even_S1 = np.maximum(counts.demand.mean(1, keepdims=True), 1e-9)
                relative_ES = (counts.demand / even_S1).T
                image = axes.imshow(relative_ES, aspect="auto", cmap="cividis", vmin=0, vmax=2, interpolation="nearest")
                shown = np.unique(np.linspace(0, len(counts.steps) - 1, min(5, len(counts.steps))).astype(int))
                axes.set_xticks(shown, [str(counts.steps[i]) for i in shown])
                axes.set_yticks(sorted({0, counts.demand.shape[1] - 1}))
                axes.grid(visible=False)
                axes.set_title(panel(label, layer), fontsize=10, loc="left")
        figure.supxlabel("step", fontsize=11)
        figure.supylabel("expert", fontsize=11)
        if image is not None:
            figure.colorbar(image, ax=grid, label="demand / even share", extend="max", shrink=min(1.0, 2 / len(rows)))
            yield render(
                f"load_over_time{part}",
                f"Demand per expert over training{part.replace('_', ' ')}",
                f"{HEAT_CAPTION}{seed}",
                figure,
            )


HEAT_CAPTION = (
    "Assignments that asked for each expert in the logged optimizer steps, before any drop, relative to an even share: "
    "grey is even, yellow is twice an even share or more, dark blue is none. Arms with a single expert are not shown."
)


def drops_by_position(arms: Sequence[Arm], labels: Sequence[str], looks: Sequence[Style]) -> Iterator[Picture]:
    """Drop rate against the place in the routing group, in training and in evaluation, for arms that drop."""
    stages = {"train_step": "training", "final_pass": "evaluation"}
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    dropping: dict[str, Any] = {}
    for axes, (stage, title) in zip(grid, stages.items(), strict=True):
        for i, (arm, look) in enumerate(zip(arms, looks, strict=True)):
            counts = [np.sum(list(run.drops[stage].values()), 0) for run in arm.runs if run.drops.get(stage)]
            if not counts or not np.sum(counts, 0)[1].any():
                continue
            asked_N, dropped_N = np.sum(counts, 0)
            x = 100 * (np.arange(len(asked_N)) + 0.5) / len(asked_N)
            (line,) = axes.plot(
                x, 100 * dropped_N / np.maximum(asked_N, 1), color=look.color, marker=look.marker, ls=look.line, ms=4
            )
            dropping.setdefault(labels[i], line)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("place in the routing group [%]")
        axes.set_ylim(bottom=0)
    if not dropping:
        return
    grid[0].set_ylabel("dropped [%]")
    figure.legend(dropping.values(), dropping, loc="outside lower center", frameon=False, ncols=legend_columns(labels))
    caption = (
        "Share of the assignments asked for that found their expert full, by the token's place in its routing group, "
        "over all layers and logged steps. Who serves in order drops late tokens: an expert's queue tells how many "
        "came before. Arms that drop nothing are not shown."
    )
    yield render("drops_by_position", "Drops by position", caption, figure)


# From the sparse layers' phases to the rest of the step.
PHASES = {
    "router": "#0072B2",
    "assignment": "#56B4E9",
    "dispatch": "#009E73",
    "experts": "#D55E00",
    "combine": "#E69F00",
    "other_forward": "#BBBBBB",
    "waiting": "#CC79A7",
    "backward_and_optimizer": "#777777",
}


def time_bars(arms: Sequence[Arm], labels: Sequence[str]) -> Iterator[Picture]:
    """The parts of a training step in milliseconds: a bar per arm."""
    taken = [[mean(arm, steady(f"train_time/{phase}")) or 0.0 for phase in PHASES] for arm in arms]
    shown = [i for i, times in enumerate(taken) if any(times)]
    if not shown:
        return
    figure = Figure(figsize=(7.6, 1.4 + 0.34 * len(shown)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(shown))
    for j, (phase, color) in enumerate(PHASES.items()):
        width = np.array([1e3 * taken[i][j] for i in shown])
        axes.barh([labels[i] for i in shown], width, left=left, color=color, label=phase.replace("_", " "), height=0.7)
        left += width
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time of a training step [ms]")
    figure.legend(loc="outside lower center", frameon=False, ncols=4, fontsize=10)
    caption = (
        "Mean over the logged steps after the first and over processes. The first five are the sparse layers in the "
        "forward pass; their backward pass is in the last part."
    )
    yield render("step_time", "Where the time of a step goes", caption, figure)


def relative(run: Run, stage: str, layer: str) -> np.ndarray:
    """Demand and load of the last pass relative to an even share of the demand, [2, E]."""
    counts = run.counts[stage][layer]
    both_2E = np.stack([counts.demand[-1], counts.load[-1]]).astype(float)
    relative_2E: np.ndarray = both_2E / max(both_2E[0].mean(), 1e-9)
    return relative_2E


def layer_names(arms: Sequence[Arm]) -> list[str]:
    """All sparse layers of these arms, in the order of the model."""
    found: dict[str, None] = {}
    for arm in arms:
        for stages in arm.first.counts.values():
            found.update(dict.fromkeys(stages))
    return list(found)
