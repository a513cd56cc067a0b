"""The code of docs/library.md is one program, and it runs."""

import subprocess
import sys
from pathlib import Path

import lightning_base
from lightning_base import routing

PAGE = Path(__file__).parents[2] / "docs" / "library.md"


def program() -> str:
    """The Python blocks of the page, every other line blank, so that a traceback's line is the page's."""
    inside, lines = False, []
    for line in PAGE.read_text().splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    return "\n".join(lines)


def test_the_code_of_the_page_runs_and_does_what_it_says(tmp_path: Path) -> None:
    code = program()
    assert code.count("assert ") >= 5
    (tmp_path / "library.py").write_text(code)
    done = subprocess.run([sys.executable, "library.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    header, *rows = (tmp_path / "loads.csv").read_text().splitlines()
    assert header == "step,stage,layer,expert,demand,load"
    # 2 steps are recorded, of a layer with 4 experts and one with 8.
    assert len(rows) == 2 * (4 + 8)


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
