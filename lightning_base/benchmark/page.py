"""Fills the tables of docs/performance.md from the records of runs, so that no figure is typed by hand."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning_base.benchmark import layer
from lightning_base.benchmark.arms import Setting
from lightning_base.benchmark.figure import draw
from lightning_base.benchmark.machine import machine_line
from lightning_base.benchmark.record import Record
from lightning_base.benchmark.table import Row, aims, markdown, number, rows, tables

LAYER = (
    "forward / floor",
    "forward+backward / floor",
    "forward+backward / dense",
    "peak memory / floor",
    "matrix products / forward+backward",
)
ATTAINABLE = "attainable / measured"
COMPILED = ", compiled"
OF_OTHER_RUNS = ("long", "compiled")


def write(page: Path, result: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> None:
    """Replaces what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, and draws the figure.

    Args:
        page: to be filled.
        result: of ``all``, as ``--json`` keeps it.
        others: runs of single subjects: the long form of the layer, and the step with ``--compile``. What they would
            fill is left as it stands where there is none.

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
    for other in others:
        if of_layer := [record for record in other["records"] if record["subject"] == "layer"]:
            parts["long"] = lambda other=other, given=of_layer: long_form(other, given, by_subject["layer"])  # type: ignore[misc]
        if any(record["arm"].endswith(COMPILED) and record["subject"] == "step" for record in other["records"]):
            parts["compiled"] = lambda other=other: compiled_steps(other)  # type: ignore[misc]
    for name in by_subject.keys() - {"layer"}:
        parts[name] = lambda name=name: "\n\n".join(  # type: ignore[misc]
            f"{title.partition(': ')[2]}:\n\n{markdown(table)}" for title, table in tables(by_subject[name])
        )

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name in OF_OTHER_RUNS and name not in parts:
            return found[0]
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
    measured = {record["measure"] for record in records}
    shown = [measure for measure in LAYER if measure in measured]
    parts = []
    for setting, group in groupby(records, key=lambda record: record["setting"]):
        parts.append(f"{setting}:\n\n{markdown(rows(list(group), shown))}")
    notes = {record["arm"]: record["note"] for record in records if record.get("note")}
    return "\n\n".join([*parts, *(f"{arm}: {note}." for arm, note in notes.items())])


def long_form(result: Mapping[str, Any], records: Sequence[Record], shown: Sequence[Record]) -> str:
    """Tables of the sizes that the other run alone has, its machine, and which sizes no table shows."""
    known = {record["setting"] for record in shown}
    more = [record for record in records if record["setting"] not in known]
    known |= {record["setting"] for record in more}
    missing = [str(setting) for setting in (Setting(*size) for size in layer.FULL) if str(setting) not in known]
    end = f"Not measured: {', '.join(missing)}." if missing else ""
    return "\n\n".join(part for part in (machine_text(result), layer_tables(more), end) if part)


def compiled_steps(result: Mapping[str, Any]) -> str:
    """The steps through ``torch.compile`` and those without in the same turns, over the dense arm's without."""
    steps = [record for record in result["records"] if record["subject"] == "step"]
    return f"{machine_text(result)}\n\n{markdown(rows(steps, ('step / dense',)))}"


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
