"""The figures: differences with their intervals, loss over cost, loss against speed, load of experts, time of a step.

Shapes: S recorded steps, E experts, N bins.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lightning_base.report import measures
from lightning_base.report.answer import contrasts, not_quiet
from lightning_base.report.drawing import LOOK, heatmap, legend_columns, panels, render, styles
from lightning_base.report.formats import WORDS, Picture
from lightning_base.report.measures import CURVE, by_seed, final_loss, mean, speed, validated
from lightning_base.results.fairness import Arm, Comparison, stage_of
from lightning_base.results.read import Counts
from lightning_base.results.statistics import margin

CAPTIONS = WORDS["captions"]
# How the lines of each arm look.
Looks = dict[Arm, dict[str, Any]]


def pictures(comparison: Comparison) -> list[Picture]:
    """All figures of a comparison; those without data are left out."""
    with mpl.rc_context(fname=LOOK):
        looks = styles(comparison.arms)
        return [
            *differences(comparison, looks),
            *loss_curves(looks),
            *pareto(comparison.arms),
            *load_bars(looks),
            *load_heatmaps(comparison.arms),
            *drops_by_position(looks),
            *time_bars(comparison.arms),
        ]


def differences(comparison: Comparison, looks: Looks) -> Iterator[Picture]:
    """A forest plot: an arm a line, its difference to the reference with its interval, a dot per seed."""
    reference, arms = comparison.reference, comparison.arms
    found = dict(sorted(contrasts(reference, arms).items(), key=lambda pair: pair[1].mean))
    if not found:
        return
    figure = Figure(figsize=(5.6, 1.2 + 0.36 * len(found)))
    axes = figure.subplots()
    axes.axvline(0, color="#444444", lw=1)
    for line, (arm, gap) in enumerate(found.items()):
        color, above = looks[arm]["color"], [line - 0.2 * gap.known] * len(gap.values)
        axes.plot(gap.values, above, "o", color=color, ms=4.5, alpha=0.6, mec="none")
        if gap.known:
            axes.plot((gap.low, gap.high), (line, line), color=color, lw=2, solid_capstyle="butt")
            filled = color if gap.decided else "white"
            axes.plot(gap.mean, line, "D", color=color, mfc=filled, ms=7, gid=f"difference{arms.index(arm)}")
    axes.set_yticks(range(len(found)), [arm.label for arm in found])
    axes.set(ylim=(len(found) - 0.5, -0.5), xlabel=f"loss minus that of {reference.label} [nats per token]")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", visible=False)
    caption = CAPTIONS["difference" if any(gap.known for gap in found.values()) else "difference_of_one_seed"]
    yield render("difference", f"Difference to {reference.label}", caption, figure)


SHOWN = {
    "steps": ("optimizer steps", "Learning per token"),
    "time": ("training time [s]", "Learning per second"),
    "FLOPs": ("FLOPs", "Learning per FLOP"),
}


def loss_curves(looks: Looks) -> Iterator[Picture]:
    """Validation loss against steps, training time and FLOPs."""
    arms = list(looks)
    if not validated(arms):
        return
    sequences = arms[0].first.fields.get("data.validation_sequences")
    text = f"{sequences} sequences spread evenly over the validation text" if sequences else "the validation text"
    spread = " Lines are means over seeds, bands their 95 % t intervals." * any(len(arm.runs) > 1 for arm in arms)
    across = legend_columns(arm.label for arm in arms)
    for key, (axis, title) in SHOWN.items():
        figure = Figure(figsize=(5.4, 4.0 + 0.24 * -(-len(arms) // across)))
        axes = figure.subplots()
        ends = {}
        for i, (arm, look) in enumerate(looks.items()):
            if runs := validated([arm]):
                length = min(len(run.series[CURVE].values) for run in runs)
                x = np.mean([measures.cost(run, key)[:length] for run in runs], 0)
                y = np.stack([run.series[CURVE].values[:length] for run in runs])
                (line,) = axes.plot(x, y.mean(0), ms=5, label=arm.label, gid=f"line{i}", **look)
                ends[line] = float(y[:, -1].mean())
                if len(runs) > 1:
                    half = np.array([margin(column) for column in y.T.tolist()])
                    axes.fill_between(x, y.mean(0) - half, y.mean(0) + half, color=look["color"], alpha=0.15, lw=0)
        axes.set(xlabel=axis, ylabel="validation loss [nats per token]", xlim=(0, None))
        if key == "FLOPs":
            axes.xaxis.set_major_formatter(EngFormatter())
        # In the order in which the lines end, the highest first.
        figure.legend(handles=sorted(ends, key=lambda line: -ends[line]), loc="outside lower center", ncols=across)
        caption = f"Validation loss over {text} (the table has all of it) against {axis}. {CAPTIONS[key]}{spread}"
        yield render(f"loss_{key.lower()}", title, caption, figure)


def pareto(arms: Sequence[Arm]) -> Iterator[Picture]:
    """Loss against speed, balance in colour; a line joins the arms that none beats in both."""
    found = {arm: (mean(arm, speed), mean(arm, final_loss)) for arm in arms}
    points = {arm: point for arm, point in found.items() if np.isfinite(point).all()}
    if len(points) < 2:
        return
    figure = Figure(figsize=(5.6, 4.2))
    axes = figure.subplots()
    front = pareto_front([point if arm.causal else (0.0, np.inf) for arm, point in points.items()])
    joined = sorted(list(points.values())[i] for i in front)
    axes.plot(*zip(*joined, strict=True), color="#888888", lw=1, ls="--", gid="front")
    balance = [mean(arm, measures.ROUTED[-1].read) for arm in points]
    look: dict[str, Any] = {"s": 80, "cmap": "viridis_r", "edgecolors": "black", "zorder": 3, "plotnonfinite": True}
    signs = not_quiet(arms)
    paces, losses = zip(*points.values(), strict=True)
    shown = axes.scatter(paces, losses, c=balance, **look)
    axes.margins(0.15)
    seen = axes.get_xlim(), axes.get_ylim()
    for arm, point in points.items():
        across, along = (margin(list(by_seed(arm, read).values())) for read in (speed, final_loss))
        axes.errorbar(*point, xerr=across, yerr=along, color="#999999", lw=1)
        text = arm.label + "‡" * (not arm.causal) + signs[arm]
        axes.annotate(text, point, (7, 5), textcoords="offset points", fontsize=10)
    axes.set(xlim=seen[0], ylim=seen[1], xlabel="training tokens per second", ylabel="validation loss [nats per token]")
    figure.colorbar(shown, ax=axes, label="max_vio in evaluation (0 is even)")
    yield render("pareto", "Loss, speed and balance", CAPTIONS["pareto"], figure)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points (speed, loss) no other one beats: none is at least as fast and as low, and better in one of them."""
    return [
        i
        for i, (pace, loss) in enumerate(points)
        if np.isfinite(loss)
        and not any(p >= pace and other <= loss and (p, other) != (pace, loss) for p, other in points)
    ]


def load_bars(looks: Looks) -> Iterator[Picture]:
    """Load of experts in the final evaluation, fullest first: a row per arm and evaluation mode, a column per layer."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for arm, look in looks.items():
        for mode in arm.modes if arm.sparse else ():
            found = [run.counts.get(f"{stage_of(arm, mode)}_pass", {}) for run in arm.runs]
            shares = {layer: [fullest_first(each[layer]) for each in found if layer in each] for layer in found[0]}
            label = arm.label + f", {mode}" * (len(arm.modes) > 1)
            bars = {layer: (np.mean(share, 0), look["color"]) for layer, share in shares.items()}
            rows += [(label, bars)] * bool(bars)
    for part, figure, drawn in panels(rows, "expert, fullest first", "tokens / even share", sharey=True):
        for axes, ((demand_E, load_E), color) in drawn:
            experts = np.arange(len(load_E))
            axes.bar(experts, load_E, color=color, width=0.8)
            axes.bar(experts, demand_E - load_E, bottom=load_E, color="white", edgecolor=color, width=0.75)
            axes.axhline(1, color="#444444", lw=1)
            axes.grid(axis="x", visible=False)
            axes.set_xticks(experts[:: max(len(experts) // 8, 1)])
        title = f"Load per expert in evaluation{part.replace('_', ' ')}"
        yield render(f"load_bars{part}", title, CAPTIONS["load_bars"], figure)


def fullest_first(counts: Counts) -> np.ndarray:
    """Demand and load of the last pass relative to an even share of the demand, [2, E], by falling load.

    An expert's number means nothing across seeds: a mean over seeds by number would look even where no seed is.
    """
    both_2E = np.stack([counts.demand[-1], counts.load[-1]])
    return np.asarray(both_2E[:, np.argsort(-both_2E[1], kind="stable")] / max(both_2E[0].mean(), 1e-9))


def load_heatmaps(arms: Sequence[Arm]) -> Iterator[Picture]:
    """Demand over training: a row per arm, a column per layer, experts over logged steps."""
    rows = [(arm.label, found) for arm in arms if arm.sparse and (found := arm.first.counts.get("train_step"))]
    seed = f" Seed {arms[0].seeds[0]} of {len(arms[0].seeds)}." if len(arms[0].seeds) > 1 else ""
    for part, figure, drawn in panels(rows, "step", "expert"):
        for axes, counts in drawn:
            image = heatmap(axes, (counts.demand / np.maximum(counts.demand.mean(1, keepdims=True), 1e-9)).T)
            shown = np.unique(np.linspace(0, len(counts.steps) - 1, min(5, len(counts.steps))).astype(int))
            axes.set_xticks(shown, map(str, counts.steps[shown]))
            axes.set_yticks(sorted({0, counts.demand.shape[1] - 1}))
        shrink = min(1.0, 2 / len(rows))
        figure.colorbar(image, ax=figure.axes, label="demand / even share", extend="max", shrink=shrink)
        title = f"Demand per expert over training{part.replace('_', ' ')}"
        yield render(f"load_over_time{part}", title, CAPTIONS["load_over_time"] + seed, figure)


def drops_by_position(looks: Looks) -> Iterator[Picture]:
    """Drop rate against the place in the routing group, in training and in evaluation, for arms that drop."""
    figure = Figure(figsize=(7.6, 3.6))
    grid = figure.subplots(1, 2, sharey=True)
    dropping: dict[str, Any] = {}
    for axes, stage, title in zip(grid, ("train_step", "final_pass"), ("training", "evaluation"), strict=True):
        for arm, look in looks.items():
            layers = [counts for run in arm.runs for counts in run.drops.get(stage, {}).values()]
            dropped_N = sum(counts.load.sum(0) for counts in layers)
            if np.any(dropped_N):
                asked_N = sum(counts.demand.sum(0) for counts in layers)
                x = 100 * (np.arange(len(asked_N)) + 0.5) / len(asked_N)
                dropping[arm.label] = axes.plot(x, 100 * dropped_N / np.maximum(asked_N, 1), ms=4, **look)[0]
        axes.set_title(title, fontsize=11, loc="left")
        axes.set(xlabel="place in the routing group [%]", ylim=(0, None))
    if dropping:
        grid[0].set_ylabel("dropped [%]")
        across = legend_columns(arm.label for arm in looks)
        figure.legend(dropping.values(), dropping, loc="outside lower center", ncols=across)
        yield render("drops_by_position", "Drops by position", CAPTIONS["drops_by_position"], figure)


def time_bars(arms: Sequence[Arm]) -> Iterator[Picture]:
    """The parts of a training step in milliseconds: a bar per arm."""
    phases = {phase: measures.milliseconds(f"train_time/{phase}") for phase in measures.PHASES}
    times = {arm.label: np.nan_to_num([mean(arm, read) for read in phases.values()]) for arm in arms}
    shown = {label: taken for label, taken in times.items() if taken.any()}
    if not shown:
        return
    figure = Figure(figsize=(7.6, 1.4 + 0.34 * len(shown)))
    axes = figure.subplots()
    left = np.zeros(len(shown))
    for (phase, color), width in zip(measures.PHASES.items(), np.transpose(list(shown.values())), strict=True):
        axes.barh(list(shown), width, left=left, color=color, label=phase.replace("_", " "), height=0.7)
        left += width
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time of a training step [ms]")
    figure.legend(loc="outside lower center", ncols=4, fontsize=10)
    yield render("step_time", "Where the time of a step goes", CAPTIONS["step_time"], figure)
