"""How figures look: one colour, marker and line per arm in every figure and report, and how they become pictures."""

import textwrap
import zlib
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lightning_base.report.formats import TEMPLATES, Picture
from lightning_base.results.fairness import Arm

# Colours of Okabe and Ito, which people with any kind of colour vision can tell apart, for those who meet most often;
# of Paul Tol for the others. Markers say it once more. Blue to violet balances by prices or biases, warm and green lets
# tokens choose, grey looks at nothing.
ROUTERS = {
    "BASE": ("#0072B2", "o"),
    "Switch": ("#D55E00", "s"),
    "TopK": ("#009E73", "^"),
    "Dense": ("#000000", "D"),
    "GatedDense": ("#707070", "d"),
    "Uniform": ("#CC79A7", "v"),
    "Sinkhorn": ("#56B4E9", "X"),
    "LossFree": ("#332288", "d"),
    "Quantile": ("#44AA99", "h"),
    "BIP": ("#6A51A3", "p"),
    "NoisyTopK": ("#E69F00", "<"),
    "GShard": ("#882255", ">"),
    "ExpertChoice": ("#AA4499", "*"),
    "Hash": ("#999933", "P"),
    "Random": ("#8C8C8C", "8"),
    "Skewed": ("#5F4B32", "H"),
    "Replay": ("#DDAA33", "."),
}
# For routers that are not in the table; which one depends on the name alone, so that it is the same in every report.
SPARE = (("#E69F00", "P"), ("#56B4E9", "X"), ("#999999", "*"), ("#E69F00", "<"), ("#56B4E9", ">"), ("#999999", "p"))
LINES = ("-", "--", "-.", ":")
LAYERS_PER_FIGURE = 4
LOOK = TEMPLATES / "figures.mplstyle"


def router_color(router: str) -> tuple[str, str]:
    """Colour and marker of a router by its class name."""
    return ROUTERS.get(router) or SPARE[zlib.crc32(router.encode()) % len(SPARE)]


def styles(arms: Sequence[Arm]) -> dict[Arm, dict[str, Any]]:
    """How the line of each arm looks: the router's colour; arms of one router get lighter shades and other lines."""
    found = {}
    for arm in arms:
        alike = [other for other in arms if other.router == arm.router]
        place, (color, marker) = alike.index(arm), router_color(arm.router)
        shade = lighten(color, 0.5 * place / max(1, len(alike) - 1))
        found[arm] = {"color": shade, "marker": marker, "ls": LINES[place % len(LINES)]}
    return found


def lighten(color: str, share: float) -> str:
    """A colour moved towards white by a share of the way.

    >>> lighten("#000000", 0.5)
    '#808080'
    """
    red, green, blue = (share + (1 - share) * part for part in to_rgb(color))
    return to_hex((red, green, blue))


def render(name: str, title: str, caption: str, figure: Figure) -> Picture:
    """Draws a figure once for pages and once for viewers that show no SVG; the same input gives the same bytes."""
    svg, png = BytesIO(), BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=130)
    return Picture(name, title, caption, float(figure.get_figwidth()), svg.getvalue(), png.getvalue())


def legend_columns(labels: Iterable[str]) -> int:
    """How many labels fit beside each other under a figure."""
    longest = max(map(len, labels))
    return 4 if longest < 9 else 2 if longest < 24 else 1


def chunks(layers: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Layers in portions that fit beside each other, with a suffix for the figure's name."""
    for start in range(0, len(layers), LAYERS_PER_FIGURE):
        part = f"_{start // LAYERS_PER_FIGURE + 1}" if len(layers) > LAYERS_PER_FIGURE else ""
        yield part, layers[start : start + LAYERS_PER_FIGURE]


def panels(
    rows: Sequence[tuple[str, dict[str, Any]]], across: str, along: str, **options: Any
) -> Iterator[tuple[str, Figure, list[tuple[Axes, Any]]]]:
    """Figures of a row per label and a column per layer; a layer that a row does not have stays empty.

    Args:
        rows: labels, and what is drawn by layer.
        across: what the horizontal axes show, ``along`` the vertical ones.
        options: of ``Figure.subplots``.

    Yields:
        a suffix for the figure's name, the figure, and its panels with what is drawn in each.
    """
    for part, layers in chunks(list(dict.fromkeys(layer for _, found in rows for layer in found))):
        figure = Figure(figsize=(2 + 3 * len(layers), 0.8 + 1.6 * len(rows)))
        grid = figure.subplots(len(rows), len(layers), squeeze=False, **options)
        drawn = []
        for (label, found), line in zip(rows, grid, strict=True):
            for layer, axes in zip(layers, line, strict=True):
                axes.set_title(textwrap.fill(f"{label}: {layer.replace('_', ' ')}", 40), fontsize=10, loc="left")
                drawn += [(axes, found[layer])] if layer in found else []
                axes.set_axis_on() if layer in found else axes.set_axis_off()
        figure.supxlabel(across, fontsize=11)
        figure.supylabel(along, fontsize=11)
        yield part, figure, drawn


def heatmap(axes: Axes, relative: np.ndarray) -> AxesImage:
    """Numbers of which 1 is even: grey; 2 and more are yellow, 0 is dark blue."""
    axes.grid(visible=False)
    return axes.imshow(relative, aspect="auto", cmap="cividis", vmin=0, vmax=2, interpolation="nearest")
