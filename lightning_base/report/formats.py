"""One table, and one document, in every format: HTML, Markdown, LaTeX, CSV, and the columns of a terminal.

Templates have what is fixed; ``words.yaml`` what headings mean, what stands above tables, footnotes and captions.
"""

import base64
import csv
import io
import json
import re
import shlex
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from markupsafe import escape as escape_html

from lightning_base.report.measures import Column
from lightning_base.results.read import printable

TEMPLATES = Path(__file__).with_name("templates")
WORDS: dict[str, dict[str, str]] = yaml.safe_load((TEMPLATES / "words.yaml").read_text(encoding="utf-8"))
LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
LATEX |= {"^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "†": r"\dag{}", "‡": r"\ddag{}"}
LATEX |= {"§": r"\S{}", "¶": r"\P{}"}
# Braces are LaTeX's own.
MARKS: dict[str, Any] = {"block_start_string": "<%", "block_end_string": "%>"}
MARKS |= {"variable_start_string": "<<", "variable_end_string": ">>"}


class Strong(str):
    """A cell with a difference that is beyond noise."""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row is its heading.

    ``lead`` says, above the table, what was measured; ``figures`` are the beginnings of the names of figures that
    belong to it; ``help`` explains the headings that stand here for the first time.
    """

    title: str
    columns: list[Column]
    rows: list[list[str]]
    lead: str = ""
    figures: tuple[str, ...] = ()
    help: tuple[tuple[str, str], ...] = ()

    @property
    def headings(self) -> list[str]:
        """For formats with one line of headings: one that stands under several groups says which."""
        names = [column.heading for column in self.columns]
        return [f"{c.group.partition(':')[0]} " * (names.count(c.heading) > 1) + c.heading for c in self.columns]

    @property
    def groups(self) -> list[tuple[str, int, int]]:
        """The headings above the headings, with the first and the last of the columns each spans, counted from 1."""
        spans = [(group, list(found)) for group, found in groupby(enumerate(self.columns, 1), lambda c: c[1].group)]
        return [(group, found[0][0], found[-1][0]) for group, found in spans]


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its file name without a suffix, what one sees in it, and its bytes in two formats.

    ``width`` is in inches, at which its letters have the size of the text around it.
    """

    name: str
    title: str
    caption: str
    width: float
    svg: bytes
    png: bytes


def render(template: str, *folders: Path, **what: Any) -> str:
    """Fills a template with what comes from files, escaped as the template's format asks.

    Args:
        template: the file's name; its ending is the format.
        folders: with templates, besides the report's.
        what: the template's variables.
    """
    suffix = template.rpartition(".")[2]
    escape = {"html": escape_html, "md": markdown, "tex": latex, "txt": printable}[suffix]
    environment = Environment(
        **(MARKS if suffix == "tex" else {}),
        trim_blocks=True,
        undefined=StrictUndefined,
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else Markup(escape(str(value))),
        loader=FileSystemLoader([*folders, TEMPLATES]),
    )
    environment.tests["strong"] = lambda text: isinstance(text, Strong)
    environment.filters |= {
        "columns": columns,
        "command": shlex.join,
        "encoded": lambda content: base64.b64encode(content).decode(),
        "json": lambda content: json.dumps(content, indent=2),
        "yaml": lambda content: yaml.safe_dump(content, sort_keys=False),
        # Cells break before an interval only: a column is then as narrow as its mean.
        "glued": lambda text: re.sub(" (?![±(])", "\u00a0", text),
    }
    return environment.get_template(template).render(what)


def columns(table: Table) -> str:
    """A table in columns, headings broken at spaces so that it stays narrow."""
    headings = list(zip_longest(*(name.split()[::-1] for name in table.headings), fillvalue=""))[::-1]
    # By column: each as wide as its widest cell, the first one to the left.
    sized = [(max(map(len, cells)), cells) for cells in zip(*headings, *table.rows, strict=True)]
    grid = [[cell.rjust(width) if j else cell.ljust(width) for cell in cells] for j, (width, cells) in enumerate(sized)]
    lines = ["  ".join(line).rstrip() for line in zip(*grid, strict=True)]
    return "\n".join([*lines[: len(headings)], "-" * len(max(lines, key=len)), *lines[len(headings) :]])


def markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", printable(" ".join(text.split())))


def latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(LATEX.get(c, c) for c in printable(" ".join(text.split())))


def table_csv(table: Table) -> str:
    """The cells as they are shown, under headings that name their group."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([table.headings, *table.rows])
    return file.getvalue()
