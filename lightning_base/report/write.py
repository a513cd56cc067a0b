"""Writes the report of one or several directories."""

import difflib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lightning_base.report.document import Document, Section, build
from lightning_base.report.page import html
from lightning_base.report.picture import Picture
from lightning_base.report.read import ReportError
from lightning_base.report.tabular import numbers_csv, table_csv, table_latex
from lightning_base.report.text import markdown, terminal

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
    drawn: list[list[Picture]] = []
    for i, section in enumerate(document.sections):
        found = pictures(section.comparison, section.labels)
        drawn.append([replace(picture, name=f"{prefix(i, document)}{picture.name}") for picture in found])
    target = place(paths)
    try:
        target.mkdir(exist_ok=True)
        folder = target / FIGURES
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for picture in (picture for found in drawn for picture in found):
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        for i, section in enumerate(document.sections):
            for name, content in files(section):
                (folder / f"{prefix(i, document)}{name}").write_text(content, encoding="utf-8")
        (target / "report.md").write_text(markdown(document, drawn, FIGURES), encoding="utf-8")
        (target / "report.html").write_text(html(document, drawn), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"the report cannot be written to {target}: {error}") from error
    if not quiet:
        announce(document, target)
    return target / "report.html"


def prefix(i: int, document: Document) -> str:
    """What the files of a section begin with, where there are several."""
    return f"{i + 1}_" if len(document.sections) > 1 else ""


def files(section: Section) -> Iterator[tuple[str, str]]:
    """Names and contents of the tables beside the page."""
    for table in section.tables:
        name = re.sub(r"\W+", "_", table.title.lower()).strip("_")
        yield f"{name}.csv", table_csv(table)
        yield f"{name}.tex", table_latex(table)
    yield "numbers.csv", numbers_csv(section.comparison, section.labels)


def place(directories: Sequence[Path]) -> Path:
    """Where the report of these directories goes."""
    if len(directories) == 1:
        return directories[0]
    return directories[0].resolve().parent / "+".join(path.resolve().name for path in directories)


def announce(document: Document, target: Path) -> None:
    print(terminal(document))
    print(f"\nreport: {target / 'report.html'}\n        {target / 'report.md'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program behind ``experiments/report.py``; gives the exit code."""
    names = list(sys.argv[1:] if arguments is None else arguments)
    if not names or any(name.startswith("-") for name in names):
        asked = bool(set(names) & {"-h", "--help"})
        usage = "usage: python experiments/report.py NAME_OR_DIRECTORY [...]  (a name is looked for in runs/)"
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else BAD_INPUT
    try:
        write_report(*(find(name) for name in names))
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
    present = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
    near = difflib.get_close_matches(Path(name).name, present, cutoff=0.5)
    there = f"did you mean {' or '.join(near)}?" if near else f"{runs}/ holds {', '.join(present[:8]) or 'nothing'}"
    raise ReportError(f"{name} is neither a directory nor a name under {runs}/: {there}")
