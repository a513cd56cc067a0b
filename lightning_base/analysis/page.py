"""One HTML page that needs nothing else: no network, no scripts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_base.analysis.measure import LEAST, Findings, LayerFindings
from lightning_base.analysis.run import FinishedRun
from lightning_base.analysis.tables import ON_PAGE, Name, attracted_rows, percent, summary_rows
from lightning_base.analysis.words import lead, missing, sentences
from lightning_base.report.formats import Picture, render


@dataclass(frozen=True)
class ExpertRow:
    """One expert of the table: its share of the load, and what it attracts as (token, lift)."""

    number: int
    load: str
    tokens: list[tuple[str, str]]
    preceding: list[tuple[str, str]]


@dataclass(frozen=True)
class AttractionTable:
    """The table of one layer."""

    name: str
    experts: list[ExpertRow]


def html(run: FinishedRun, findings: Findings, pictures: Sequence[Picture], files: Sequence[str], name: Name) -> str:
    """The page; whatever comes from files is escaped."""
    return render(
        "analysis.html",
        Path(__file__).with_name("templates"),
        kind="analysis",
        name=run.name,
        lead=lead(run, findings),
        sentences=sentences(findings),
        missing=missing(run, findings),
        summary=list(summary_rows(findings)),
        pictures=pictures,
        attraction=attraction(findings, name),
        files=files,
        percent=percent,
        least=LEAST,
    )


def attraction(findings: Findings, name: Name) -> list[AttractionTable]:
    """The table of each layer."""
    rows = list(attracted_rows(findings, name, ON_PAGE))
    return [attraction_table(layer, [row for row in rows if row["layer"] == layer.name]) for layer in findings.layers]


def attraction_table(layer: LayerFindings, rows: Sequence[dict[str, object]]) -> AttractionTable:
    """One row per expert."""
    load = layer.choices.load
    total = max(1, int(load.sum()))

    def found(expert: int, kind: str) -> list[tuple[str, str]]:
        mine = [row for row in rows if row["expert"] == expert and row["kind"] == kind]
        return [(str(row["token"]), f"{row['lift']:.1f}×") for row in mine]

    experts = [
        ExpertRow(i, percent(int(count) / total), found(i, "token"), found(i, "preceding"))
        for i, count in enumerate(load)
    ]
    return AttractionTable(layer.name, experts)
