"""The figure of docs/claims.md: every arm against dense, the scale of routers, and a longer run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_base.claims.inside import SCALES
from lightning_base.claims.studies import NAMES, MissingError, Studies, difference, final_loss, loss_at, mean
from lightning_base.claims.why import LENGTHS, routers_of
from lightning_base.report.drawing import ROUTERS
from lightning_base.results.statistics import Interval


def draw(path: Path, studies: Studies) -> None:
    """Writes the figure as PNG; a panel whose experiment has not run stays empty and says so."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 3, width_ratios=(4, 3, 4))
    for axes, panel in zip(panels, (against_dense, by_scale, along_a_run), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e3e3")
        axes.set_axisbelow(True)
        try:
            panel(axes, studies)
        except MissingError as error:
            axes.set_title(str(error), fontsize=8, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def against_dense(axes: Axes, studies: Studies) -> None:
    """A line per arm: its difference from dense with the interval, and each seed."""
    arms = {router: studies.arm("compare", router) for router in NAMES}
    found = {router: difference(arm, arms["Dense"]) for router, arm in arms.items() if router != "Dense"}
    order = sorted(found, key=lambda router: found[router].mean)
    for place, router in enumerate(order):
        color, marker = ROUTERS[router]
        gap = found[router]
        axes.errorbar(gap.mean, place, xerr=bars([gap]), color=color, marker=marker, capsize=4)
        seeds = [final_loss(run) - final_loss(arms["Dense"][seed]) for seed, run in arms[router].items()]
        axes.plot(seeds, [place + 0.2] * len(seeds), ".", color=color, alpha=0.5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(order)), [NAMES[router] for router in order])
    axes.invert_yaxis()
    axes.set(xlabel="loss minus dense [nats per token]", title="Same seed, same batches, same weights")


def by_scale(axes: Axes, studies: Studies) -> None:
    """Loss over how much larger the weights of routers are at first."""
    for router in ("BASE", "Switch", "TopK"):
        arms = (studies.either("router_scale", router, module__router_init_scale=scale) for scale in SCALES)
        found = [mean(arm) for arm in arms]
        color, marker = ROUTERS[router]
        means = [one.mean for one in found]
        axes.errorbar(SCALES, means, yerr=bars(found), color=color, marker=marker, capsize=4, label=NAMES[router])
    axes.set_xscale("log")
    axes.set_xticks(SCALES, [f"{scale:g}" for scale in SCALES])
    axes.minorticks_off()
    axes.set(xlabel="first weights of the router, times its paper's", ylabel="loss", title="How large routers start")
    axes.legend(frameon=False)


def along_a_run(axes: Axes, studies: Studies) -> None:
    """Differences from dense along a run ten times as long."""
    arms = {router: studies.arm("length", router) for router in routers_of(studies, "length")}
    for router in (router for router in arms if router != "Dense"):
        found = [difference(arms[router], arms["Dense"], loss_at(step)) for step in LENGTHS]
        color, marker = ROUTERS[router]
        axes.plot(LENGTHS, [gap.mean for gap in found], color=color, marker=marker)
        axes.fill_between(LENGTHS, [gap.low for gap in found], [gap.high for gap in found], color=color, alpha=0.08)
        end = (LENGTHS[-1], found[-1].mean)
        axes.annotate(NAMES[router], end, (8, 0), textcoords="offset points", color=color, va="center")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss minus dense", title="Ten times as long", xlim=(0, 1.3 * LENGTHS[-1]))


def bars(found: Sequence[Interval]) -> np.ndarray:
    """Lengths of error bars, [2, N]; none where one seed gives no interval."""
    return np.nan_to_num(np.array([[one.margin for one in found]] * 2))
