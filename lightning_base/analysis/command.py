"""The program ``analysis``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lightning_base.analysis.measure import measure
from lightning_base.analysis.route import read_text, route
from lightning_base.analysis.run import AnalysisError, open_data, open_run
from lightning_base.analysis.tables import token_name, write_tables
from lightning_base.analysis.words import lead, missing, sentences
from lightning_base.program.explain import BAD_INPUT
from lightning_base.program.rank import quiet

FOLDER, PAGE = "analysis", "analysis.html"
# Enough for tens of thousands of tokens in the smallest configuration, and some seconds per checkpoint.
SEQUENCES = 1024


def analyse(path: Path, sequences: int | None = SEQUENCES) -> Path:
    """Analyses a finished run; writes into its ``analysis/`` folder and gives the path of the page.

    Args:
        path: the run's directory.
        sequences: validation sequences to route, spread evenly over the split; None is all of them.

    Raises:
        ValueError: the run cannot be analysed, in one sentence.
    """
    run = open_run(path)
    data = open_data(run, sequences)
    findings = measure(read_text(data), route(run, data))
    # Imported late: drawing needs a second to load, and most mistakes are found before.
    from lightning_base.analysis.figures import draw
    from lightning_base.analysis.page import html

    assert data.prepared is not None
    name = token_name(data.prepared.tokenizer())
    pictures = draw(findings, run.router)
    folder = path / FOLDER
    try:
        clear(folder)
        files = write_tables(folder, findings, name)
        for picture in pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
            files.append(f"{picture.name}.png")
        (folder / PAGE).write_text(html(run, findings, pictures, files, name), encoding="utf-8")
    except OSError as error:
        raise AnalysisError(f"the analysis cannot be written to {folder}: {error}") from error
    print(
        "\n".join(
            [lead(run, findings), *sentences(findings), *(f"not shown: {text}" for text in missing(run, findings))]
        )
    )
    print(f"\nanalysis: {folder / PAGE}\n          {', '.join(files)} beside it")
    return folder / PAGE


def clear(folder: Path) -> None:
    """An empty folder for the results; what an earlier analysis left would not belong to these."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if old.name == PAGE or old.suffix in (".png", ".csv"):
            old.unlink()


class Parser(argparse.ArgumentParser):
    """Answers a mistake in one line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line; gives the exit code."""
    parser = Parser(prog="analysis", description="What the experts of a finished run have learnt.")
    parser.add_argument("run", type=Path, help="the directory of one run, e.g. runs/compare/router=base")
    parser.add_argument(
        "--sequences",
        type=how_many,
        default=SEQUENCES,
        help=f"validation sequences to route, spread over the split, or all; {SEQUENCES} by default",
    )
    options = parser.parse_args(arguments)
    quiet()
    try:
        analyse(options.run, options.sequences)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; nothing of an earlier analysis was changed", file=sys.stderr)
        return 130
    return 0


def how_many(text: str) -> int | None:
    """A number of sequences; ``all`` is None."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of sequences: give 1 or more, or all")
    return int(text)
