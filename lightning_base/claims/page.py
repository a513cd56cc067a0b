"""Fills the tables of docs/claims.md, so that no number on it is typed by hand."""

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lightning_base.claims.studies import MissingError, Studies
from lightning_base.claims.verdict import Judged, Rows
from lightning_base.results.read import ReportError


def table(rows: Rows) -> str:
    """Markdown; the first row is the heading."""
    heading, *body = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    rule = " | ".join(["---"] + ["---:"] * (len(rows[0]) - 1))
    return "\n".join(f"| {line} |" for line in (heading, rule, *body))


def verdicts(judged: Sequence[Judged | tuple[str, str]]) -> str:
    """The claims with their verdicts: the table to look at first."""
    rows: Rows = [["", "claim", "verdict"]]
    for i, one in enumerate(judged, 1):
        title, verdict = (
            (one.title, one.verdict.value) if isinstance(one, Judged) else (one[0], f"not judged: {one[1]}")
        )
        rows.append([str(i), title, f"**{verdict}**"])
    return table(rows)


def details(judged: Sequence[Judged | tuple[str, str]]) -> str:
    """Every claim with its rule, its numbers and how to repeat them."""
    parts = []
    for i, one in enumerate(judged, 1):
        if not isinstance(one, Judged):
            parts.append(f"### {i}. {one[0]}\n\nNot judged: {one[1]}.")
            continue
        again = "; ".join(f"`make experiment EXPERIMENT={name}`" for name in one.experiments) or "`make claims`"
        parts.append(
            f"### {i}. {one.title}\n\n**{one.verdict.value.capitalize()}.** {one.rule}\n\n{table(one.rows)}\n\n"
            f"{one.conditions} Repeat it: {again}."
        )
    return "\n\n".join(parts)


def fill(
    page: Path,
    judged: Sequence[Judged | tuple[str, str]],
    tables: Mapping[str, Callable[[Studies], Rows]],
    studies: Studies,
) -> list[str]:
    """Replaces what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; gives what was missing.

    A table whose experiments have not run keeps what stood there.
    """
    missing: list[str] = []

    def one(found: re.Match[str]) -> str:
        name = found[1]
        try:
            if name == "verdicts":
                text = verdicts(judged)
            elif name == "claims":
                text = details(judged)
            elif name == "conditions":
                return found[0]  # told at the end, when it is known which experiments were read
            else:
                text = table(tables[name](studies))
        except (MissingError, ReportError) as error:
            missing.append(f"{name}: {error}")
            return found[0]
        return f"<!-- begin {name} -->\n\n{text}\n\n<!-- end {name} -->"

    written = re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", one, page.read_text(), flags=re.DOTALL)
    try:
        told = f"<!-- begin conditions -->\n\n{conditions(studies)}\n\n<!-- end conditions -->"
        written = re.sub(
            r"<!-- begin conditions -->.*?<!-- end conditions -->", lambda _: told, written, flags=re.DOTALL
        )
    except (MissingError, ReportError) as error:
        missing.append(f"conditions: {error}")
    page.write_text(written)
    return missing


def conditions(studies: Studies) -> str:
    """When, where and with what the default comparison was run, what is of another commit, and what was left out."""
    runs = studies.experiment("compare")
    first = runs[0].manifest
    newest = max(float(run.status["updated"]) for run in runs)
    day = datetime.datetime.fromtimestamp(newest, datetime.UTC).date()
    own = str(first["git_commit"])[:12]
    text = (
        f"Run on {day}, code at commit {own}, {first['device']}, torch "
        f"{first['packages']['torch']}, {first['steps']} steps of {first['tokens'] // first['steps']:,} tokens, seeds "
        f"{', '.join(str(seed) for seed in sorted({run.seed for run in runs}))}."
    )
    others: dict[str, list[str]] = {}
    for name, commits in studies.commits().items():
        for commit in sorted({commit[:12] for commit in commits} - {own}):
            others.setdefault(commit, []).append(name)
    for commit, names in sorted(others.items()):
        text += f" At commit {commit}: {', '.join(sorted(names))}."
    out = "".join(f"\n- left out: {job.name}: {job.state}: {job.reason}" for job in studies.left_out)
    return text + ("\n" + out if out else "")
