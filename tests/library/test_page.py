"""docs/library.md names what there is. Its code runs in test_installed_wheel.py."""

from pathlib import Path

import lightning_base
from lightning_base import routing

PAGE = Path(__file__).parents[2] / "docs" / "library.md"


def program() -> str:
    """The Python blocks of the page as one program, other lines blank, so that a traceback has the line of the page."""
    inside, lines = False, []
    for line in PAGE.read_text().splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    return "\n".join(lines)


def test_the_page_names_every_public_name() -> None:
    text = PAGE.read_text()
    assert [name for name in lightning_base.__all__ if name != "Assignment" and f"`{name}`" not in text] == []


def test_the_routers_that_the_page_says_need_token_ids_are_those_that_do() -> None:
    named = PAGE.read_text().partition("`needs_token_ids`:")[2].partition(")")[0]
    overridden = {
        name
        for name in routing.__all__
        if isinstance(found := getattr(routing, name), type)
        and issubclass(found, routing.Router)
        and found.needs_token_ids is not routing.Router.needs_token_ids
    }
    # Replay looks groups up by their text, and belongs to the harness.
    assert {name for name in overridden if f"`{name}`" in named} == overridden - {"Replay"}
