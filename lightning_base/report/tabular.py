"""The tables as files for other programs: CSV, LaTeX, and every number of every run."""

import csv
import io
from collections.abc import Sequence

from lightning_base.report.fairness import Comparison
from lightning_base.report.measures import ALL
from lightning_base.report.page import heading_groups
from lightning_base.report.read import printable
from lightning_base.report.table import Table

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


def table_csv(table: Table) -> str:
    """The cells as they are shown, under headings that name their group."""
    return rows_csv([table.headings, *table.rows])


def numbers_csv(comparison: Comparison, labels: Sequence[str]) -> str:
    """Every number of every run unrounded, a row each: for who wants to compute with them."""
    rows = [["arm", "seed", "group", "measure", "value"]]
    for label, arm in zip(labels, comparison.arms, strict=True):
        for run in arm.runs:
            values = [(measure, measure.read(run)) for measure in ALL]
            rows += [[label, str(run.seed), m.group, m.heading, repr(v)] for m, v in values if v is not None]
    return rows_csv(rows)


def rows_csv(rows: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def table_latex(table: Table) -> str:
    """A ``tabular`` in the manner of booktabs, to be put into a ``table`` with a caption."""
    sides = ["l", *("l" if column.words else "r" for column in table.columns[1:])]
    above, rules, start = [], [], 1
    for group, size in heading_groups(table):
        above.append(rf"\multicolumn{{{size}}}{{c}}{{{latex(group)}}}" if group else " & ".join([""] * size))
        rules += [rf"\cmidrule(lr){{{start}-{start + size - 1}}}"] * bool(group)
        start += size
    rows = [
        [rf"\textbf{{{latex(text)}}}" if (i, j) in table.strong else latex(text) for j, text in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    lines = [rf"% {latex(table.title)}; needs \usepackage{{booktabs}}", rf"\begin{{tabular}}{{{''.join(sides)}}}"]
    lines += [r"\toprule", *[" & ".join(above) + r" \\", " ".join(rules)] * bool(rules)]
    lines += [" & ".join(latex(column.heading) for column in table.columns) + r" \\", r"\midrule"]
    lines += [" & ".join(row) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(LATEX.get(c, c) for c in printable(" ".join(text.split())))
