"""The report as Markdown, and as plain text for a terminal."""

import re
from collections.abc import Sequence

from lightning_base.report.document import Document, Section, column_help
from lightning_base.report.picture import Picture
from lightning_base.report.read import printable
from lightning_base.report.table import Table

SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


def markdown(document: Document, pictures: Sequence[Sequence[Picture]], folder: str) -> str:
    """Markdown with the same sentences and tables as the page; figures are files in ``folder``."""
    lines = [f"# {escape(document.title)}", ""]
    for section, drawn in zip(document.sections, pictures, strict=True):
        lines += markdown_section(section, drawn, folder, several=len(document.sections) > 1)
    if document.left_out:
        lines += ["## Not in any table", ""]
        lines += [f"- **{escape(j.label)}** ({escape(j.state)}): {escape(j.reason)}" for j in document.left_out]
        lines.append("")
    lines += ["## How to read the columns", ""]
    tables = [table for section in document.sections for table in section.tables]
    lines += [f"- **{escape(name)}**: {escape(text)}" for name, text in column_help(tables)]
    return "\n".join(lines) + "\n"


def markdown_section(section: Section, drawn: Sequence[Picture], folder: str, several: bool) -> list[str]:
    lines = [f"## {escape(section.title)}", ""] if several else []
    if section.apart:
        lines += ["Not comparable with the first table:", "", *(f"- {escape(line)}" for line in section.apart), ""]
    lines += [f"**{escape(section.summary[0])}**", "", *(f"- {escape(line)}" for line in section.summary[1:]), ""]
    lines += [line for text in section.cautions for line in (f"> **{escape(text)}**", "")]
    for table in section.tables:
        lines += [f"### {escape(table.title)}", "", *([escape(table.lead), ""] if table.lead else [])]
        lines += [*markdown_table(table), ""]
    for picture in drawn:
        name, title = f"{folder}/{picture.name}.png", escape(picture.title)
        lines += [f"### {title}", "", f"![{title}]({name})", "", escape(picture.caption), ""]
    shared = "; ".join(f"{name} {value}" for name, value in section.made_with)
    return [*lines, f"Shared by all arms: {escape(shared)}.", ""]


def markdown_table(table: Table) -> list[str]:
    """The table and its footnotes."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    # Markdown has one line of headings: a heading that stands under several groups says which.
    headings = [column.heading for column in table.columns]
    names = [
        f"{column.group.partition(':')[0].lower()} {column.heading}"
        if headings.count(column.heading) > 1
        else column.heading
        for column in table.columns
    ]
    rows = [
        [f"**{escape(text)}**" if (i, j) in table.strong else escape(text) for j, text in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    rule = ["---", *("---" if column.words else "---:" for column in table.columns[1:])]
    notes = [text for note in table.notes for text in ("", escape(note))]
    return [line([escape(name) for name in names]), line(rule), *map(line, rows), *notes]


def terminal(document: Document) -> str:
    """Sentences and the main table of every section, in columns."""
    lines: list[str] = []
    for section in document.sections:
        lines += [f"== {section.title}"] * bool(section.title)
        lines += [f"   differs from the first table in {line}" for line in section.apart]
        lines += [*section.summary, *(f"NOTE {text}" for text in section.cautions), "", *columns(section.tables[0]), ""]
        lines += [*section.tables[0].notes, ""] if section.tables[0].notes else []
    lines += [f"not in any table: {job.label} ({job.state}): {job.reason}" for job in document.left_out]
    return printable("\n".join(lines).strip())


def columns(table: Table) -> list[str]:
    """A table in columns, headings broken at spaces so that it stays narrow."""
    words = [column.heading.split() for column in table.columns]
    height = max(len(word) for word in words)
    headings = [[""] * (height - len(word)) + word for word in words]
    grid = [list(row) for row in zip(*headings, strict=True)] + [list(row) for row in table.rows]
    widths = [max(len(row[j]) for row in grid) for j in range(len(table.columns))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in grid
    ]
    return [*lines[:height], "-" * len(max(lines, key=len)), *lines[height:]]


def escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return SPECIAL.sub(r"\\\1", printable(" ".join(text.split())))
