"""Records as tables: for every setting one row per arm and one column per ratio."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from lightning_base.benchmark.record import Record, reached

FIGURES = {
    "value": "",
    "ms": "ms",
    "step_ms": "ms a step",
    "tokens_per_second": "tokens/s",
    "feed_forward_flops": "feed-forward FLOPs",
    "optimizer_share": "optimizer's share",
    "page_faults": "page faults",
    "dropped": "dropped",
    "exchange": "exchange / step",
    "sent_megabytes": "MB sent a layer and step",
    "messages": "peers",
    "gradient_megabytes": "MB of gradients",
    "megabytes": "MB",
    "newton_steps": "Newton steps",
    "too_many": "too many",
    "rounds_of_paths": "rounds of paths",
    "searches": "searches",
    "paths": "paths",
    "tokens_moved": "tokens moved",
}
Row = list[str]
Render = Callable[[Sequence[Row]], str]


def tables(records: Iterable[Record]) -> Iterator[tuple[str, list[Row]]]:
    """A title and rows, the first of them the heading, for every subject and setting."""
    for (subject, setting), group in groupby(records, key=lambda record: (record["subject"], record["setting"])):
        yield f"{subject}: {setting}", rows(list(group))


def rows(records: Sequence[Record], measures: Sequence[str] | None = None) -> list[Row]:
    """Arms down, measures across; a cell is the median with its quartiles. Figures of an arm stand at the end.

    Args:
        records: of one setting.
        measures: which, in this order; all of them if not given.
    """
    records = [record for record in records if measures is None or record["measure"] in measures]
    arms = list(dict.fromkeys(record["arm"] for record in records))
    measures = measures or list(dict.fromkeys(record["measure"] for record in records))
    found = {(record["arm"], record["measure"]): record for record in records}
    figures = [name for name in FIGURES if any(record.get(name) is not None for record in records)]
    out = [["", *measures, *(FIGURES[name] for name in figures)]]
    for arm in arms:
        cells = [cell(found[arm, measure]) if (arm, measure) in found else "" for measure in measures]
        # The last record of an arm that has a figure: forward and backward come after forward.
        own = [record for record in reversed(records) if record["arm"] == arm]
        more = [next((figure(one, name) for one in own if one.get(name) is not None), "") for name in figures]
        out.append([arm, *cells, *more])
    return out


def cell(record: Record) -> str:
    """A ratio and its quartiles."""
    if record["rounds"] == 1:
        return number(record["ratio"])
    return f"{number(record['ratio'])} ({number(record['low'])}–{number(record['high'])})"


def number(value: float) -> str:
    """Three digits that matter, or four decimals of a small share."""
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.2f}"


def figure(record: Record, name: str) -> str:
    """A figure that is no ratio, with its unit if it brings one."""
    return f"{record[name]:,}{' ' + record['unit'] if name == 'value' else ''}"


def aims(records: Iterable[Record]) -> Iterator[tuple[str, list[Row]]]:
    """For every subject, its aims down and its settings across: what was measured, and whether that is enough."""
    aimed = [record for record in records if reached(record) is not None]
    for subject, group in groupby(aimed, key=lambda record: record["subject"]):
        own = list(group)
        settings = list(dict.fromkeys(record["setting"] for record in own))
        cells = {(record["arm"], record["measure"], record["setting"]): judged(record) for record in own}
        names = list(dict.fromkeys((record["arm"], record["measure"]) for record in own))
        names.sort(key=lambda name: [record["measure"] for record in own].index(name[1]))
        body = [[arm, measure, *(cells.get((arm, measure, s), "") for s in settings)] for arm, measure in names]
        yield f"aims of {subject}", [["arm", "measure", *settings], *body]


def judged(record: Record) -> str:
    """What was measured, the aim, and by how much it was missed."""
    measured = f"{record['value']:g} {record['unit']}" if "value" in record else number(record["ratio"])
    aim = f"{'≤' if record['better'] == 'lower' else '≥'} {record['aim']:g}"
    if reached(record):
        return f"{measured} ({aim})"
    value = float(record["value"] if "value" in record else record["ratio"])
    return f"{measured} ({aim}: missed by {abs(value / record['aim'] - 1):.0%})"


def text(table: Sequence[Row]) -> str:
    """For a terminal: columns of equal width."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)


def markdown(table: Sequence[Row]) -> str:
    """For a page."""
    heading, *body = table
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *body))


def whole(records: Sequence[Record]) -> str:
    """All tables, then the aims."""
    return "\n\n".join(f"{title}\n\n{text(table)}" for part in (tables, aims) for title, table in part(records))
