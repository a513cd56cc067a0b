"""The figures of quality: differences with their intervals, loss over three measures of cost, loss against speed."""

from collections.abc import Iterator, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lightning_base.report.answer import against_reference
from lightning_base.report.drawing import LOOK, Picture, Style, legend_columns, render, styles
from lightning_base.report.fairness import Arm, Comparison
from lightning_base.report.loads import CAPTIONS, drops_by_position, load_bars, load_heatmaps, time_bars
from lightning_base.report.measures import CURVE, ROUTED, by_seed, cost, final_loss, mean, validated
from lightning_base.report.speed import speed
from lightning_base.report.statistics import margin


def pictures(comparison: Comparison) -> list[Picture]:
    """All figures of a comparison; those without data are left out."""
    arms, looks = comparison.arms, styles(comparison.arms)
    with mpl.rc_context(LOOK):
        return [
            *differences(comparison, looks),
            *loss_curves(arms, looks),
            *pareto(arms),
            *load_bars(arms, looks),
            *load_heatmaps(arms),
            *drops_by_position(arms, looks),
            *time_bars(arms),
        ]


def differences(comparison: Comparison, looks: Sequence[Style]) -> Iterator[Picture]:
    """A forest plot: an arm a line, its difference to the reference with its interval, a dot per seed."""
    arms, reference = comparison.arms, comparison.arms[comparison.reference].label
    found = sorted(against_reference(comparison).values(), key=lambda contrast: contrast.interval.mean)
    if not found:
        return
    figure = Figure(figsize=(5.6, 1.2 + 0.36 * len(found)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#444444", lw=1)
    for line, contrast in enumerate(found):
        gap, color = contrast.interval, looks[contrast.arm].color
        axes.plot(gap.values, [line - 0.2 * gap.known] * gap.n, "o", color=color, ms=4.5, alpha=0.6, mec="none")
        if gap.known:
            axes.plot((gap.low, gap.high), (line, line), color=color, lw=2, solid_capstyle="butt")
            filled = color if contrast.decided else "white"
            axes.plot(gap.mean, line, "D", color=color, mfc=filled, ms=7, gid=f"difference{contrast.arm}")
    axes.set_yticks(range(len(found)), [arms[contrast.arm].label for contrast in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"loss minus that of {reference} [nats per token]")
    several = any(contrast.interval.known for contrast in found)
    caption = CAPTIONS["difference" if several else "difference_of_one_seed"]
    yield render("difference", f"Difference to {reference}", caption, figure)


SHOWN = {
    "steps": ("optimizer steps", "Learning per token"),
    "time": ("training time [s]", "Learning per second"),
    "FLOPs": ("FLOPs", "Learning per FLOP"),
}


def loss_curves(arms: Sequence[Arm], looks: Sequence[Style]) -> Iterator[Picture]:
    """Validation loss against steps, training time and FLOPs."""
    if not validated(arms):
        return
    sequences = arms[0].first.config.get("data", {}).get("validation_sequences")
    text = f"{sequences} sequences spread evenly over the validation text" if sequences else "the validation text"
    several = max(len(arm.runs) for arm in arms) > 1
    spread = " Lines are means over seeds, bands their 95 % t intervals." if several else ""
    across = legend_columns([arm.label for arm in arms])
    for key, (axis, title) in SHOWN.items():
        figure = Figure(figsize=(5.4, 4.0 + 0.24 * -(-len(arms) // across)), layout="constrained")
        axes = figure.subplots()
        ends = {}
        for i, (arm, look) in enumerate(zip(arms, looks, strict=True)):
            runs = validated([arm])
            if not runs:
                continue
            length = min(len(run.series[CURVE].values) for run in runs)
            x = np.mean([cost(run, key)[:length] for run in runs], 0)
            y = np.stack([run.series[CURVE].values[:length] for run in runs])
            (line,) = axes.plot(x, y.mean(0), ms=5, label=arm.label, gid=f"line{i}", **look.of_line)
            if len(runs) > 1:
                half = np.array([margin(column) for column in y.T.tolist()])
                axes.fill_between(x, y.mean(0) - half, y.mean(0) + half, color=look.color, alpha=0.15, lw=0)
            ends[line] = float(y[:, -1].mean())
        axes.set(xlabel=axis, ylabel="validation loss [nats per token]")
        axes.set_xlim(left=0)
        if key == "FLOPs":
            axes.xaxis.set_major_formatter(EngFormatter())
        # In the order in which the lines end, the highest first.
        handles = sorted(ends, key=lambda line: -ends[line])
        figure.legend(handles=handles, loc="outside lower center", frameon=False, ncols=across)
        caption = f"Validation loss over {text} (the table has all of it) against {axis}. {CAPTIONS[key]}{spread}"
        yield render(f"loss_{key.lower()}", title, caption, figure)


def pareto(arms: Sequence[Arm]) -> Iterator[Picture]:
    """Loss against speed, balance in colour; a line joins the arms that none beats in both."""
    points = [
        (pace, loss, arm)
        for arm in arms
        if (pace := mean(arm, speed)) is not None and np.isfinite(loss := mean(arm, final_loss) or np.nan)
    ]
    if len(points) < 2:
        return
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.subplots()
    front = pareto_front([(pace, loss) if arm.causal else (0.0, np.inf) for pace, loss, arm in points])
    axes.plot(*zip(*sorted(points[j][:2] for j in front), strict=True), color="#888888", lw=1, ls="--", gid="front")
    violations = [mean(arm, ROUTED[-1].read) for *_, arm in points]
    paces, losses, _ = zip(*points, strict=True)
    shown = axes.scatter(
        paces,
        losses,
        c=[np.nan if value is None else value for value in violations],
        s=80,
        cmap="viridis_r",
        edgecolors="black",
        zorder=3,
        plotnonfinite=True,
    )
    axes.margins(0.15)
    seen = axes.get_xlim(), axes.get_ylim()
    for pace, loss, arm in points:
        across, along = (margin(list(by_seed(arm, read).values())) for read in (speed, final_loss))
        axes.errorbar(pace, loss, xerr=across, yerr=along, color="#999999", lw=1)
        text = arm.label + "‡" * (not arm.causal)
        axes.annotate(text, (pace, loss), (7, 5), textcoords="offset points", fontsize=10)
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
