"""Writes the parity table of docs/parallel.md from a real run: ``python parity_page.py``.

Run with the repository, its ``tests`` and ``tests/distributed`` in PYTHONPATH.
"""

import tempfile
from pathlib import Path

import program
from parity import LAYOUTS, Training, difference
from router_arms import ROUTERS
from test_parity import ALONE, trainings

PAGE = program.REPOSITORY / "docs" / "parallel.md"
BEGIN, END = "<!-- parity table -->", "<!-- end of the parity table -->"


def table(found: dict[tuple[str, str], Training]) -> str:
    """Routers by layouts: the largest difference to one rank; assignments and counts have to be equal."""
    layouts = [layout for layout in LAYOUTS if layout != ALONE]
    rows = [["router", *layouts], ["---"] * (len(layouts) + 1)]
    for router in ROUTERS:
        alone, cells = found[ALONE, router], []
        for layout in layouts:
            other = found[layout, router]
            same = other.decisions == alone.decisions and other.counts == alone.counts
            cells.append(f"{max(difference(alone, other).values()):.0e}" if same else "**other experts**")
        rows.append([router, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        text = table(trainings(Path(folder), ROUTERS, list(LAYOUTS)))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
