"""How figures look, and how they become pictures."""

import textwrap
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

from matplotlib.figure import Figure

from lightning_base.report.picture import Picture

# A white ground of its own: readable on light and dark pages alike.
LOOK: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # Labels come from files: a dollar sign in them is a dollar sign.
    "text.parse_math": False,
    "svg.hashsalt": "lightning_base",
}
LAYERS_PER_FIGURE = 4


def render(name: str, title: str, caption: str, figure: Figure) -> Picture:
    """Draws a figure once for pages and once for viewers that show no SVG; the same input gives the same bytes."""
    svg, png = BytesIO(), BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=130)
    return Picture(name, title, caption, float(figure.get_figwidth()), svg.getvalue(), png.getvalue())


def legend_columns(labels: Sequence[str]) -> int:
    """How many labels fit beside each other under a figure."""
    longest = max(map(len, labels))
    return 4 if longest < 9 else 2 if longest < 24 else 1


def panel(label: str, layer: str) -> str:
    """The title of one small figure, broken where it would not fit."""
    return textwrap.fill(f"{label}: {layer.replace('_', ' ')}", 40)


def chunks(layers: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Layers in portions that fit beside each other, with a suffix for the figure's name."""
    for start in range(0, len(layers), LAYERS_PER_FIGURE):
        part = f"_{start // LAYERS_PER_FIGURE + 1}" if len(layers) > LAYERS_PER_FIGURE else ""
        yield part, layers[start : start + LAYERS_PER_FIGURE]
