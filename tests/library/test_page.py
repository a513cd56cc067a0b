"""docs/library.md names what there is. Its code runs in tests/docs, and from the wheel."""

import re
from pathlib import Path

import lightning_base
from lightning_base import routing

PAGE = Path(__file__).parents[2] / "docs" / "library.md"


def test_the_page_names_every_public_name() -> None:
    text = PAGE.read_text()
    assert [name for name in lightning_base.__all__ if name != "Assignment" and f"`{name}`" not in text] == []


def test_what_a_router_of_ones_own_imports_is_in_the_api() -> None:
    page = (PAGE.parent / "own_router.md").read_text()
    imported = re.findall(r"^from (lightning_base\S*) import (.+)$", page, re.MULTILINE)
    names = {f"{module}.{name}" for module, listed in imported for name in listed.split(", ")}
    assert len(names) > 5
    described = (
        (PAGE.parent / "api" / "routers.md").read_text().replace("lightning_base.routing.Rout", "lightning_base.Rout")
    )
    assert [name for name in sorted(names) if f"::: {name}\n" not in described] == []


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
