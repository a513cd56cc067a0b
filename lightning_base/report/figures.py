"""The figures of quality: differences with their intervals, loss over three measures of cost, loss against speed."""

from collections.abc import Iterator, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lightning_base.report.answer import contrasts
from lightning_base.report.colors import Style, styles
from lightning_base.report.curves import CURVE, cost
from lightning_base.report.drawing import LOOK, legend_columns, render
from lightning_base.report.fairness import Arm, Comparison
from lightning_base.report.loads import drops_by_position, load_bars, load_heatmaps, time_bars
from lightning_base.report.measures import ROUTED, by_seed, final_loss, mean, speed
from lightning_base.report.picture import Picture
from lightning_base.report.statistics import margin


def pictures(comparison: Comparison, labels: Sequence[str]) -> list[Picture]:
    """All figures of a comparison; those without data are left out."""
    looks = styles(comparison.arms)
    with mpl.rc_context(LOOK):
        return [
            *differences(comparison, labels, looks),
            *loss_curves(comparison.arms, labels, looks),
            *pareto(comparison.arms, labels),
            *load_bars(comparison.arms, labels, looks),
            *load_heatmaps(comparison.arms, labels),
            *drops_by_position(comparison.arms, labels, looks),
            *time_bars(comparison.arms, labels),
        ]


def differences(comparison: Comparison, labels: Sequence[str], looks: Sequence[Style]) -> Iterator[Picture]:
    """A forest plot: an arm a line, its difference to the reference with its interval, a dot per seed."""
    reference = labels[comparison.reference]
    found = contrasts(comparison, comparison.reference, range(len(labels)))
    if not found:
        return
    found.sort(key=lambda contrast: contrast.interval.mean)
    several = any(contrast.interval.known for contrast in found)
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
    axes.set_yticks(range(len(found)), [labels[contrast.arm] for contrast in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"loss minus that of {reference} [nats per token]")
    caption = (
        "Left of 0 is better. Dots: the difference of each seed. Diamond and line: their mean with its 95 % t "
        "interval; a filled diamond is beyond noise (p below 0.05 after Holm's correction), an empty one is undecided."
        if several
        else "Left of 0 is better. One seed: how far these differences are noise cannot be said."
    )
    yield render("difference", f"Difference to {reference}", caption, figure)


def loss_curves(arms: Sequence[Arm], labels: Sequence[str], looks: Sequence[Style]) -> Iterator[Picture]:
    """Validation loss against steps, training time and FLOPs."""
    sequences = arms[0].first.config.get("data", {}).get("validation_sequences")
    text = f"{sequences} sequences spread evenly over the validation text" if sequences else "the validation text"
    several = max(len(arm.runs) for arm in arms) > 1
    spread = " Lines are means over seeds, bands their 95 % t intervals." if several else ""
    shown = {
        "steps": ("optimizer steps", "Learning per token", "All arms see the same tokens at the same step."),
        "time": ("training time [s]", "Learning per second", "Validation and checkpoints take none of it."),
        "FLOPs": ("FLOPs", "Learning per FLOP", "Dropped tokens are counted as if they had been computed."),
    }
    for key, (axis, title, note) in shown.items():
        across = legend_columns(labels)
        figure = Figure(figsize=(5.4, 4.0 + 0.24 * -(-len(labels) // across)), layout="constrained")
        axes = figure.subplots()
        ends: list[float] = []
        for i, (arm, look) in enumerate(zip(arms, looks, strict=True)):
            runs = [run for run in arm.runs if CURVE in run.series]
            length = min((len(run.series[CURVE].values) for run in runs), default=0)
            if not length:
                continue
            x = np.mean([cost(run, key)[:length] for run in runs], 0)
            y = np.stack([run.series[CURVE].values[:length] for run in runs])
            axes.plot(
                x, y.mean(0), color=look.color, marker=look.marker, ls=look.line, ms=5, label=labels[i], gid=f"line{i}"
            )
            if len(runs) > 1:
                half = np.array([margin(column) for column in y.T.tolist()])
                axes.fill_between(x, y.mean(0) - half, y.mean(0) + half, color=look.color, alpha=0.15, lw=0)
            ends.append(float(y[:, -1].mean()))
        if not ends:
            return
        axes.set_xlabel(axis)
        axes.set_ylabel("validation loss [nats per token]")
        axes.set_xlim(left=0)
        if key == "FLOPs":
            axes.xaxis.set_major_formatter(EngFormatter())
        # In the order in which the lines end, the highest first.
        handles, names = axes.get_legend_handles_labels()
        order = sorted(range(len(handles)), key=lambda j: -ends[j])
        figure.legend(
            [handles[j] for j in order],
            [names[j] for j in order],
            loc="outside lower center",
            frameon=False,
            ncols=across,
        )
        caption = f"Validation loss over {text} (the table has all of it) against {axis}. {note}{spread}"
        yield render(f"loss_{key.lower()}", title, caption, figure)


def pareto(arms: Sequence[Arm], labels: Sequence[str]) -> Iterator[Picture]:
    """Loss against speed, balance in colour; a line joins the arms that none beats in both."""
    points = [
        (pace, loss, i)
        for i, arm in enumerate(arms)
        if (pace := mean(arm, speed)) is not None and np.isfinite(loss := mean(arm, final_loss) or np.nan)
    ]
    if len(points) < 2:
        return
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.subplots()
    front = pareto_front([(pace, loss) if arms[i].causal else (0.0, np.inf) for pace, loss, i in points])
    joined = sorted(points[j][:2] for j in front)
    axes.plot(*zip(*joined, strict=True), color="#888888", lw=1, ls="--", gid="front")
    violations = [mean(arms[i], ROUTED[-1].read) for *_, i in points]
    shown = axes.scatter(
        [pace for pace, *_ in points],
        [loss for _, loss, _ in points],
        c=[np.nan if value is None else value for value in violations],
        s=80,
        cmap="viridis_r",
        edgecolors="black",
        zorder=3,
        plotnonfinite=True,
    )
    axes.margins(0.15)
    seen = axes.get_xlim(), axes.get_ylim()
    for pace, loss, i in points:
        across, along = (margin(list(by_seed(arms[i], read).values())) for read in (speed, final_loss))
        axes.errorbar(pace, loss, xerr=across, yerr=along, color="#999999", lw=1)
    axes.set(xlim=seen[0], ylim=seen[1], xlabel="training tokens per second", ylabel="validation loss [nats per token]")
    for pace, loss, i in points:
        text = labels[i] if arms[i].causal else f"{labels[i]}‡"
        axes.annotate(text, (pace, loss), (7, 5), textcoords="offset points", fontsize=10)
    figure.colorbar(shown, ax=axes, label="max_vio in evaluation (0 is even)")
    caption = (
        "Lower and further right is better. The broken line joins the arms that no other beats in both; arms marked "
        "‡ look ahead in evaluation and are not on it. Grey bars: 95 % t intervals, cut at the frame."
    )
    yield render("pareto", "Loss, speed and balance", caption, figure)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points (speed, loss) no other one beats: none is at least as fast and as low, and better in one of them."""
    return [
        i
        for i, (pace, loss) in enumerate(points)
        if np.isfinite(loss)
        and not any(p >= pace and other <= loss and (p, other) != (pace, loss) for p, other in points)
    ]
