"""The report as Markdown, and as plain text for a terminal."""

import re
from collections.abc import Sequence

from jinja2 import Environment, StrictUndefined

from lightning_base.report.document import Document
from lightning_base.report.picture import Picture, claimed
from lightning_base.report.read import printable
from lightning_base.report.table import Table

SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")

BODY = """\
{% macro drawn(picture) %}
### {{ picture.title|e }}

![{{ picture.title|e }}]({{ folder }}/{{ picture.name }}.png)

{{ picture.caption|e }}

{% endmacro %}
# {{ document.title|e }}

{% for section, pictures in sections %}
{% if sections|length > 1 %}
## {{ section.title|e }}

{% endif %}
{% if section.apart %}
Not comparable with the first table:

{% for line in section.apart %}
- {{ line|e }}
{% endfor %}

{% endif %}
{% for sentence in section.answer %}
**{{ sentence|e }}**

{% endfor %}
{% for picture in claimed(section.tables[0].figures, pictures) %}{{ drawn(picture) }}{% endfor %}
{% for text in section.cautions %}
> {{ text|e }}

{% endfor %}
{{ shown(section.tables[0]) }}

{% for note in section.notes %}
{{ note|e }}

{% endfor %}
{% for table in section.tables[1:] %}
<details><summary>{{ table.title|e }}</summary>

{{ shown(table) }}

{% for picture in claimed(table.figures, pictures) %}{{ drawn(picture) }}{% endfor %}
</details>

{% endfor %}
Shared by all arms: {% for name, value in section.made_with %}{{ name|e }} {{ value|e }}\
{{ "." if loop.last else "; " }}{% endfor %}


{% endfor %}
{% if document.left_out %}
## Not in any table

{% for job in document.left_out %}
- **{{ job.label|e }}** ({{ job.state|e }}): {{ job.reason|e }}
{% endfor %}
{% endif %}
"""


def markdown(document: Document, pictures: Sequence[Sequence[Picture]], folder: str) -> str:
    """Markdown with the same sentences and tables as the page; figures are files in ``folder``."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True)
    environment.filters["e"] = escape
    environment.globals.update(claimed=claimed, folder=folder)
    environment.globals["shown"] = lambda table: "\n".join(markdown_table(table))
    sections = list(zip(document.sections, pictures, strict=True))
    return environment.from_string(BODY).render(document=document, sections=sections)


def markdown_table(table: Table) -> list[str]:
    """The lines of a table, with what stands above it and the explanations below."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rows = [
        [f"**{escape(text)}**" if (i, j) in table.strong else escape(text) for j, text in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    rule = ["---", *("---" if column.words else "---:" for column in table.columns[1:])]
    words = [f"- **{escape(name)}**: {escape(text)}" for name, text in table.help]
    lead = [escape(table.lead), ""] * bool(table.lead)
    return [*lead, line([escape(name) for name in table.headings]), line(rule), *map(line, rows), "", *words]


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
