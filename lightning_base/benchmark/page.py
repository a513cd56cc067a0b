"""Fills the tables of docs/performance.md from the records of one run, so that no figure is typed by hand."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning_base.benchmark.figure import draw
from lightning_base.benchmark.machine import machine_line
from lightning_base.benchmark.record import Record
from lightning_base.benchmark.table import Row, aims, markdown, number, rows, tables

LAYER = ("forward / floor", "forward+backward / floor", "forward+backward / dense", "peak memory / floor")
ATTAINABLE = "attainable / measured"


def write(page: Path, result: Mapping[str, Any]) -> None:
    """Replaces what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, and draws the figure.

    Raises:
        ValueError: the page asks for a table that there is not.
    """
    records: list[Record] = result["records"]
    by_subject = {name: list(group) for name, group in groupby(records, key=lambda record: record["subject"])}
    parts: dict[str, Callable[[], str]] = {
        "machine": lambda: machine_text(result),
        "aims": lambda: "\n\n".join(f"{title[0].upper()}{title[1:]}:\n\n{markdown(t)}" for title, t in aims(records)),
        "layer": lambda: layer_tables(by_subject["layer"]),
        "roofline": lambda: markdown(roofline_rows(by_subject["layer"])),
    }
    for name in by_subject.keys() - {"layer"}:
        parts[name] = lambda name=name: "\n\n".join(  # type: ignore[misc]
            f"{title.partition(': ')[2]}:\n\n{markdown(table)}" for title, table in tables(by_subject[name])
        )

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name not in parts:
            raise ValueError(f"{page.name} asks for {name}, which was not measured: it has {', '.join(parts)}")
        return f"<!-- begin {name} -->\n\n{parts[name]()}\n\n<!-- end {name} -->"

    page.write_text(re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", fill, page.read_text(), flags=re.DOTALL))
    draw(page.parent / "images" / "performance.png", records)


def machine_text(result: Mapping[str, Any]) -> str:
    """The machine and how loaded it was before and after."""
    load = " ".join(f"{value:.2f}" for value in result["machine"]["load_average_after"])
    return f"{machine_line(result['machine'])} before and {load} after; the {result['form']} form."


def layer_tables(records: Sequence[Record]) -> str:
    """One table per setting, and what the peers compute that is another function."""
    parts = []
    for setting, group in groupby(records, key=lambda record: record["setting"]):
        parts.append(f"{setting}:\n\n{markdown(rows(list(group), LAYER))}")
    notes = {record["arm"]: record["note"] for record in records if record.get("note")}
    return "\n\n".join([*parts, *(f"{arm}: {note}." for arm, note in notes.items())])


def roofline_rows(records: Sequence[Record]) -> list[Row]:
    """What the machine reaches, what the layer needs, and the share of the attainable speed that is reached."""
    chosen = [record for record in records if record["measure"] == ATTAINABLE]
    arms = list(dict.fromkeys(record["arm"] for record in chosen))
    heading = [
        "T x D x E",
        "GFLOP",
        "MB",
        "product GFLOP/s",
        "expert's product GFLOP/s",
        "copy GB/s",
        "bound by",
        *arms,
    ]
    out = [heading]
    for setting, group in groupby(chosen, key=lambda record: record["setting"]):
        own = {record["arm"]: record for record in group}
        one = next(iter(own.values()))
        names = ("layer_gflop", "layer_megabytes", "gflops", "expert_gflops", "copy_gb_per_s")
        figures = [f"{one[name]:g}" for name in names]
        out.append([setting, *figures, one["bound"], *(number(own[arm]["ratio"]) for arm in arms)])
    return out
