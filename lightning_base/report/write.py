"""Writes the report of one or several directories."""

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_base.instantiation import did_you_mean
from lightning_base.report.document import build
from lightning_base.report.formats import WORDS, render, table_csv
from lightning_base.report.tables import numbers_table
from lightning_base.results.read import ReportError

FIGURES = "report_files"
BAD_INPUT = 2


def write_report(*directories: str | Path, quiet: bool = False) -> Path:
    """Writes ``report.html`` and ``report.md`` with its ``report_files/``; gives the path of the page.

    They go into the directory itself; the report of several goes into a folder beside the first, named after all.

    Args:
        directories: experiments (folders of runs) or single runs.
        quiet: print nothing.

    Raises:
        ReportError: there is nothing to report, in one sentence.
    """
    # Imported late: drawing needs a second to load, and most mistakes are found before.
    from lightning_base.report.figures import pictures

    paths = [Path(directory) for directory in directories]
    document = build(*paths)
    sections = [replace(section, pictures=pictures(section.comparison)) for section in document.sections]
    what: dict[str, Any] = {"kind": "report", "name": document.title, "sections": sections}
    what |= {"left_out": document.left_out, "headings": WORDS["headings"], "folder": FIGURES}
    files: dict[str, str | bytes] = {name: render(name, **what) for name in ("report.html", "report.md")}
    for section in sections:
        place = f"{FIGURES}/{section.prefix}"
        files |= {f"{place}{picture.name}.png": picture.png for picture in section.pictures}
        files[f"{place}numbers.csv"] = table_csv(numbers_table(section.comparison.arms))
        for table in section.tables:
            name = re.sub(r"\W+", "_", table.title.lower()).strip("_")
            files[f"{place}{name}.csv"] = table_csv(table)
            files[f"{place}{name}.tex"] = render("table.tex", table=table)
    target = paths[0]
    if len(paths) > 1:
        target = paths[0].resolve().parent / "+".join(path.resolve().name for path in paths)
    try:
        shutil.rmtree(target / FIGURES, ignore_errors=True)
        (target / FIGURES).mkdir(parents=True)
        for name, content in files.items():
            (target / name).write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise ReportError(f"the report cannot be written to {target}: {error}") from error
    if not quiet:
        said = render("report.txt", **what).strip()
        print(f"{said}\n\nreport: {target / 'report.html'}\n        {target / 'report.md'}")
    return target / "report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """The program behind ``experiments/report.py``; gives the exit code."""
    parser = argparse.ArgumentParser(prog="report", description="Writes the tables and figures of what has run.")
    parser.add_argument("names", nargs="+", metavar="NAME_OR_DIRECTORY", help="a name is looked for in runs/")
    try:
        write_report(*map(find, parser.parse_args(arguments).names))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


def find(name: str, runs: Path = Path("runs")) -> Path:
    """The directory a name stands for: a path, or a folder of ``runs/``.

    Raises:
        ReportError: neither is there; names what comes near.
    """
    for path in (runs / name, Path(name)) if "/" not in name else (Path(name),):
        if path.is_dir():
            return path
    present = [path.name for path in runs.iterdir() if path.is_dir()] if runs.is_dir() else []
    hint = did_you_mean(Path(name).name, present) if present else ", which holds nothing"
    raise ReportError(f"{name} is neither a directory nor a name under {runs}/{hint}")
