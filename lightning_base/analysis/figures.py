"""The figures, in the look of the report: a panel per sparse layer.

Shapes: E experts, L labels, D domains shown.
"""

from collections.abc import Iterator, Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from lightning_base.analysis.measure import LEAST, Findings, LayerFindings, busiest
from lightning_base.analysis.tables import percent
from lightning_base.metrics.specialization import coactivation, specialization
from lightning_base.report.drawing import LINES, LOOK, chunks, heatmap, lighten, render, router_color
from lightning_base.report.formats import Picture
from lightning_base.results.read import printable

DOMAINS_SHOWN = 12
# Above this many experts numbers in the cells of a heat map are too small to read.
NUMBERS_UP_TO = 10
CONTROL = "#767676"


def draw(findings: Findings, router: str) -> list[Picture]:
    """All figures that there is something to see in.

    Args:
        findings: what was measured.
        router: the router's class name, which has a colour.
    """
    with mpl.rc_context(fname=LOOK):
        return [
            *domains(findings),
            *vocabulary(findings, router),
            *pairs(findings),
            *over_training(findings, router),
        ]


def grid(layers: Sequence[LayerFindings], width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with a panel per layer, side by side, on one vertical axis."""
    figure = Figure(figsize=(0.9 + width * len(layers), height))
    panels = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
    for axes, layer in zip(panels, layers, strict=True):
        axes.set_title(layer.name.replace("_", " "), fontsize=10, loc="left")
    return figure, list(panels)


def portions(findings: Findings) -> Iterator[tuple[str, list[LayerFindings]]]:
    """The layers of each figure, with a suffix for its name."""
    by_name = {layer.name: layer for layer in findings.layers}
    for part, names in chunks(list(by_name)):
        yield part, [by_name[name] for name in names]


def domains(findings: Findings) -> Iterator[Picture]:
    """Domains against experts, where the corpus names more than one."""
    shown = busiest(findings.layers[0].domains.totals, DOMAINS_SHOWN)
    if len(shown) < 2:
        return
    counts = findings.layers[0].domains.totals
    names = [f"all text ({int(counts.sum()):,})"]
    names += [f"{shorten(findings.text.domains[d])} ({int(counts[d]):,})" for d in shown]
    for part, layers in portions(findings):
        experts = layers[0].choices.num_experts
        figure, panels = grid(layers, panel_side(experts), 1.3 + 0.34 * len(names))
        image = None
        for axes, layer in zip(panels, layers, strict=True):
            share_ED = specialization(layer.domains.counts, layer.domains.totals)[:, shown]
            load_E1 = layer.choices.load[:, None] / layer.choices.num_tokens
            image = shares(axes, torch.cat([load_E1, share_ED], 1).T, layer.even_share)
            axes.axhline(0.5, color="white", lw=3)
            label_experts(axes, experts)
        panels[0].set_yticks(range(len(names)), names)
        figure.supxlabel("expert", fontsize=11)
        assert image is not None
        figure.colorbar(image, ax=panels, label="share / even share", extend="max")
        caption = (
            f"N(i, domain)/N(domain) in percent: of the tokens of a domain (in brackets, of those routed here), how "
            f"many go to each expert. Grey is an even share, {percent(layers[0].even_share)}; yellow is twice that or "
            "more, dark blue is none. A domain matters to an expert where its row differs from the first. The "
            f"{len(shown)} domains of most tokens; domains.csv has all."
        )
        yield render(f"domains{part}", f"Specialization by domain{titled(part)}", caption, figure)


def vocabulary(findings: Findings, router: str) -> Iterator[Picture]:
    """How much of the text goes to the favourite expert of its token, at least."""
    color, _ = router_color(router)
    for part, layers in portions(findings):
        # The legend and the axis need this much beside a single panel.
        figure, panels = grid(layers, 2.9 if len(layers) > 1 else 4.6, 3.4)
        for axes, layer in zip(panels, layers, strict=True):
            tokens = layer.tokens
            axes.plot(*survival(tokens.control, tokens.totals), color=CONTROL, ls="--", label="tokens shuffled")
            axes.plot(*survival(tokens.counts, tokens.totals), color=color, label="routed text")
            axes.axvline(layer.even_share, color="#444444", lw=1, ls=":", label="k/E")
            axes.set(xlim=(0, 1.01), ylim=(0, 1.02))
        panels[0].set_ylabel("share of the text")
        figure.supxlabel("largest share of a token's occurrences at one expert", fontsize=11)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=3)
        caption = (
            "How much of the text consists of tokens that send at least this share of their occurrences to one expert, "
            "max over i of N(i, token)/N(token). At the right end the token alone decides the expert. Shuffled: the "
            f"same tokens at random places, what chance and uneven loads make of it. Tokens that occur {LEAST} times "
            "or more; vocabulary.csv has all."
        )
        yield render(f"vocabulary{part}", f"Specialization by vocabulary{titled(part)}", caption, figure)


def survival(counts_EL: Tensor, totals_L: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For each share x, how much of the text has a token whose favourite expert takes at least x of it."""
    held_L = totals_L >= LEAST
    weight, best = totals_L[held_L].numpy(), counts_EL.amax(0)[held_L].numpy()
    share = best / np.maximum(weight, 1)
    order = np.argsort(share)
    share, weight = share[order], weight[order]
    left = weight[::-1].cumsum()[::-1] / max(weight.sum(), 1)
    return np.concatenate([[0.0], share, share[-1:]]), np.concatenate([[1.0], left, np.zeros(len(share[-1:]))])


def pairs(findings: Findings) -> Iterator[Picture]:
    """Experts against experts, where tokens have more than one."""
    if not any(layer.has_pairs for layer in findings.layers):
        return
    for part, layers in portions(findings):
        experts = layers[0].choices.num_experts
        side = panel_side(experts)
        figure, panels = grid(layers, side, side + 0.7)
        image = None
        for axes, layer in zip(panels, layers, strict=True):
            share_EE = coactivation(layer.choices).fill_diagonal_(torch.nan)
            per_token = layer.choices.asked / layer.choices.num_tokens
            even = (per_token - 1) / (experts - 1)
            image = shares(axes, share_EE, even)
            label_experts(axes, experts)
            axes.set_yticks(*tick_experts(experts))
        panels[0].set_ylabel("expert i")
        figure.supxlabel("expert j", fontsize=11)
        assert image is not None
        figure.colorbar(image, ax=panels, label="share / even share", extend="max", shrink=0.8)
        caption = (
            "N(i and j)/N(i) in percent: of the tokens of expert i (row), how many went to expert j (column) too, over "
            f"all pairs. Grey is an even share, (k - 1)/(E - 1) = {percent(even)}; yellow is twice that or more."
        )
        yield render(f"coactivation{part}", f"Co-activation of experts{titled(part)}", caption, figure)


def over_training(findings: Findings, router: str) -> Iterator[Picture]:
    """Saturation and switching over checkpoints; a curve needs two points."""
    # At the newest checkpoint saturation is 1 by definition.
    settled = [[(m.step, m.saturation) for m in layer.moments[:-1]] for layer in findings.layers]
    if len(settled[0]) < 2:
        return
    figure, axes = curves(findings, settled, router)
    axes.axhline(findings.layers[0].even_share, color="#444444", lw=1, ls=":", label="k/E, unrelated")
    axes.set_ylabel(f"overlap with step {findings.newest:,}")
    yield finish(
        "saturation",
        "Router saturation",
        f"Mean over tokens of the share of their experts at step {findings.newest:,} that they had already at an "
        "earlier checkpoint. Near 1, routing has settled; two unrelated routings with even loads would agree on k/E.",
        figure,
    )
    switched = [
        [(m.step, m.switch_fraction) for m in layer.moments if m.switch_fraction is not None]
        for layer in findings.layers
    ]
    figure, axes = curves(findings, switched, router)
    axes.set_ylabel("tokens that changed experts")
    yield finish(
        "switching",
        "Switching between checkpoints",
        "Share of the tokens whose experts are not the same as at the checkpoint before. It depends on how far apart "
        "the checkpoints are: " + ", ".join(f"{step:,}" for step in findings.steps) + ".",
        figure,
    )


def curves(findings: Findings, lines: Sequence[list[tuple[int, float]]], router: str) -> tuple[Figure, Axes]:
    """A line of (step, share) per layer, in shades of the router's colour, the first layer darkest."""
    figure = Figure(figsize=(5.4, 4.0))
    axes = figure.subplots()
    color, marker = router_color(router)
    for i, (layer, points) in enumerate(zip(findings.layers, lines, strict=True)):
        shade = lighten(color, 0.5 * i / max(1, len(findings.layers) - 1))
        steps, shares = zip(*points, strict=True)
        name = layer.name.replace("_", " ")
        axes.plot(steps, shares, color=shade, marker=marker, ls=LINES[i % len(LINES)], ms=5, label=name)
    axes.set(xlabel="optimizer steps", ylim=(0, 1.02))
    axes.set_xlim(left=0)
    return figure, axes


def finish(name: str, title: str, caption: str, figure: Figure) -> Picture:
    """Adds the legend below."""
    figure.legend(loc="outside lower center", ncols=3)
    return render(name, title, caption, figure)


def shares(axes: Axes, share: Tensor, even: float) -> AxesImage:
    """Shares relative to an even one, in the report's colours; the percentage in each cell while it can be read."""
    values = share.numpy()
    image = heatmap(axes, values / max(even, 1e-9))
    if values.shape[1] <= NUMBERS_UP_TO:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if np.isfinite(value):
                    ink = "black" if value > 0.9 * even else "white"
                    axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=ink)
    return image


def panel_side(experts: int) -> float:
    """Inches of a heat map's panel: cells that hold a number, or so many that none does."""
    return max(2.8, 0.42 * experts) if experts <= NUMBERS_UP_TO else 3.2


def label_experts(axes: Axes, experts: int) -> None:
    axes.set_xticks(*tick_experts(experts))


def tick_experts(experts: int) -> tuple[list[int], list[str]]:
    """At most nine ticks."""
    shown = list(range(experts)) if experts <= NUMBERS_UP_TO else list(range(0, experts, -(-experts // 8)))
    return shown, [str(expert) for expert in shown]


def titled(part: str) -> str:
    return part.replace("_", " ")


def shorten(name: str, most: int = 24) -> str:
    """A name from a file that fits beside a figure."""
    clean = printable(name).replace("\n", " ")
    # Names of one corpus often begin alike: both ends stay.
    return clean if len(clean) <= most else f"{clean[: most // 2]}…{clean[-(most // 2 - 1) :]}"
