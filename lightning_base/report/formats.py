"""One table, and one document, in every format: HTML, Markdown, LaTeX, CSV, and the columns of a terminal."""

import base64
import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lightning_base.report.document import Document
from lightning_base.report.fairness import Comparison
from lightning_base.report.measures import ALL
from lightning_base.report.read import printable
from lightning_base.report.tables import Strong, Table
from lightning_base.report.words import TEMPLATES, WORDS

if TYPE_CHECKING:  # matplotlib takes a moment
    from lightning_base.report.drawing import Picture

LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "†": r"\dag{}",
    "‡": r"\ddag{}",
    "§": r"\S{}",
    "¶": r"\P{}",
}


def render(template: str, escape: Callable[[str], str] | None = None, *folders: Path, **what: Any) -> str:
    """Fills a template with what comes from files, escaped: as HTML, or by a function of its own.

    Args:
        template: the file's name.
        escape: for other formats than HTML.
        folders: with templates, besides the report's.
        what: the template's variables.
    """

    def escaped(value: Any) -> Any:
        return value if escape is None or hasattr(value, "__html__") else Markup(escape(str(value)))

    loader = FileSystemLoader([*folders, TEMPLATES])
    environment = Environment(
        loader=loader, autoescape=True, finalize=escaped, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["table"] = lambda table: Markup(markdown_table(table))
    environment.filters["encoded"] = lambda content: base64.b64encode(content).decode()
    # Cells break before an interval only: a column is then as narrow as its mean.
    environment.filters["glued"] = lambda text: re.sub(" (?![±(])", "\u00a0", text)
    return environment.get_template(template).render(what)


def html(document: Document, pictures: Sequence[Sequence["Picture"]]) -> str:
    """The page, which needs nothing else: no network, no scripts."""
    return render("report.html", kind="report", headings=WORDS["headings"], **parts(document, pictures))


def markdown(document: Document, pictures: Sequence[Sequence["Picture"]], folder: str) -> str:
    """Markdown with the same sentences and tables as the page; figures are files in ``folder``."""
    return render("report.md", markdown_text, folder=folder, **parts(document, pictures))


def parts(document: Document, pictures: Sequence[Sequence["Picture"]]) -> dict[str, Any]:
    """What both pages show: sections, with what the names of their files begin with, and their figures."""
    prefixes = [prefix(document, i) for i in range(len(document.sections))]
    sections = list(zip(document.sections, prefixes, pictures, strict=True))
    return {"name": document.title, "sections": sections, "left_out": document.left_out}


def prefix(document: Document, i: int) -> str:
    """What the names of the files of a section begin with, where there are several."""
    return f"{i + 1}_" if len(document.sections) > 1 else ""


def terminal(document: Document) -> str:
    """Answer and short table of every section, in columns."""
    lines: list[str] = []
    for section in document.sections:
        lines += [f"== {section.title}"] * bool(section.title)
        lines += [f"   differs from the first table in {line}" for line in section.apart]
        lines += [*section.answer, *(f"NOTE {text}" for text in section.cautions), "", *columns(section.tables[0]), ""]
        lines += [*section.notes, ""] if section.notes else []
    lines += [f"not in any table: {job.label} ({job.state}): {job.reason}" for job in document.left_out]
    return printable("\n".join(lines).strip())


def columns(table: Table) -> list[str]:
    """A table in columns, headings broken at spaces so that it stays narrow."""
    words = [name.split() for name in table.headings]
    height = max(map(len, words))
    headings = zip(*([""] * (height - len(word)) + word for word in words), strict=True)
    # By column: each as wide as its widest cell, the first one to the left.
    grid = [[max(map(len, cells)), *cells] for cells in zip(*headings, *table.rows, strict=True)]
    grid = [[f"{cell:{'>' if j else '<'}{width}}" for cell in cells] for j, (width, *cells) in enumerate(grid)]
    lines = ["  ".join(line).rstrip() for line in zip(*grid, strict=True)]
    return [*lines[:height], "-" * len(max(lines, key=len)), *lines[height:]]


def escaped_rows(table: Table, escape: Callable[[str], str], bold: str) -> list[list[str]]:
    return [[bold % escape(text) if isinstance(text, Strong) else escape(text) for text in row] for row in table.rows]


def markdown_table(table: Table) -> str:
    """With what stands above it and the explanations below."""
    rule = ["---", *("---" if column.words else "---:" for column in table.columns[1:])]
    rows = [list(map(markdown_text, table.headings)), rule, *escaped_rows(table, markdown_text, "**%s**")]
    lead = [markdown_text(table.lead), ""] * bool(table.lead)
    words = [f"- **{markdown_text(name)}**: {markdown_text(text)}" for name, text in table.help]
    return "\n".join([*lead, *(f"| {' | '.join(row)} |" for row in rows), "", *words])


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", printable(" ".join(text.split())))


def table_latex(table: Table) -> str:
    """A ``tabular`` in the manner of booktabs, to be put into a ``table`` with a caption."""
    sides = ["l", *("l" if column.words else "r" for column in table.columns[1:])]
    above, rules, start = [], [], 1
    for group, size in table.groups:
        above.append(rf"\multicolumn{{{size}}}{{c}}{{{latex(group)}}}" if group else " & ".join([""] * size))
        rules += [rf"\cmidrule(lr){{{start}-{start + size - 1}}}"] * bool(group)
        start += size
    lines = [rf"% {latex(table.title)}; needs \usepackage{{booktabs}}", rf"\begin{{tabular}}{{{''.join(sides)}}}"]
    lines += [r"\toprule", *[" & ".join(above) + r" \\", " ".join(rules)] * bool(rules)]
    lines += [" & ".join(latex(column.heading) for column in table.columns) + r" \\", r"\midrule"]
    lines += [" & ".join(row) + r" \\" for row in escaped_rows(table, latex, r"\textbf{%s}")]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(LATEX.get(c, c) for c in printable(" ".join(text.split())))


def table_csv(table: Table) -> str:
    """The cells as they are shown, under headings that name their group."""
    return rows_csv([table.headings, *table.rows])


def numbers_csv(comparison: Comparison) -> str:
    """Every number of every run unrounded, a row each: for who wants to compute with them."""
    rows = [["arm", "seed", "group", "measure", "value"]]
    for arm in comparison.arms:
        for run in arm.runs:
            values = [(measure, measure.read(run)) for measure in ALL]
            rows += [[arm.label, str(run.seed), m.group, m.heading, repr(v)] for m, v in values if v is not None]
    return rows_csv(rows)


def rows_csv(rows: Iterable[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()
