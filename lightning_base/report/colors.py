"""One colour, marker and line per arm, the same in every figure and every report."""

import colorsys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_base.report.fairness import Arm

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
LIGHTEST = 0.5


@dataclass(frozen=True)
class Style:
    """How an arm looks: ``color`` as #rrggbb, ``marker`` and ``line`` as matplotlib knows them."""

    color: str
    marker: str
    line: str


def router_color(router: str) -> tuple[str, str]:
    """Colour and marker of a router by its class name."""
    return ROUTERS.get(router) or SPARE[zlib.crc32(router.encode()) % len(SPARE)]


def styles(arms: Sequence[Arm]) -> list[Style]:
    """A style per arm: the router's colour; arms of one router get lighter shades and other lines, in order."""
    found = []
    for i, arm in enumerate(arms):
        alike = [j for j, other in enumerate(arms) if other.router == arm.router]
        place = alike.index(i)
        color, marker = router_color(arm.router)
        share = LIGHTEST * place / max(1, len(alike) - 1)
        found.append(Style(lighten(color, share), marker, LINES[place % len(LINES)]))
    return found


def lighten(color: str, share: float) -> str:
    """A colour moved towards white by a share of its lightness' way.

    >>> lighten("#000000", 0.5)
    '#808080'
    """
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    lighter = colorsys.hls_to_rgb(hue, lightness + (1 - lightness) * share, saturation)
    return "#" + "".join(f"{round(255 * part):02x}" for part in lighter)
