"""docs/library.md names what there is. Its code runs in test_installed_wheel.py."""

import re
from pathlib import Path

import lightning_base
from lightning_base import routing

PAGE = Path(__file__).parents[2] / "docs" / "library.md"


def program(without: str | None = None) -> str:
    """The Python blocks of the page as one program, other lines blank, so that a traceback has the line of the page.

    Args:
        without: blocks that hold this text are left out.
    """
    # Text, a fence, what is between it and the next, that one, text, and so on.
    parts = re.split(r"^(```.*)$", PAGE.read_text(), flags=re.MULTILINE)
    shown = [
        part
        if i % 4 == 2 and parts[i - 1] == "```python" and not (without and without in part)
        else "\n" * part.count("\n")
        for i, part in enumerate(parts)
    ]
    return "".join(shown)


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
