"""Finding a user's files by glob."""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_base.data.corpus import CorpusError

FILES_KEY = "data.corpus.files"


def find_files(
    files: str | Sequence[str], suffixes: Sequence[str], besides: str | None = None
) -> list[tuple[Path, str]]:
    """The files that a glob, or one of a list of globs, matches, ordered by path, each with its name.

    Names are relative to what the files have in common: the cache survives a move of the whole folder.

    Args:
        files: a glob (`**` crosses folders) or a list of them.
        suffixes: what the files may end in.
        besides: files that end in this lie beside others and are left out.

    Raises:
        CorpusError: a glob matches nothing, or something else.
    """
    found: set[Path] = set()
    for pattern in [files] if isinstance(files, str) else [str(pattern) for pattern in files]:
        paths = [Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True)]
        matches = [path for path in paths if path.is_file() and not (besides and path.name.endswith(besides))]
        folder = Path(pattern).expanduser()
        if not matches and folder.is_dir():
            globs = [f"{folders}*{suffix}" for folders in ("", "*/") for suffix in suffixes]
            there = next((one for one in globs if any(folder.glob(one))), f"*{suffixes[0]}")
            raise CorpusError(f"{FILES_KEY}={pattern} is a folder: give its files, as {folder}/{there}")
        if not matches:
            raise CorpusError(
                f"{FILES_KEY}={pattern} matches no file from {Path.cwd()}: give the path or glob of "
                f"{' or '.join(filter(None, (', '.join(suffixes[:-1]), suffixes[-1])))} files."
            )
        found.update(matches)
    if not found:
        raise CorpusError(f"{FILES_KEY} is an empty list: give at least one path or glob.")
    ordered = sorted(found, key=lambda path: path.as_posix())
    for path in ordered:
        if path.suffix not in suffixes:
            raise CorpusError(f"{FILES_KEY}: {path} is none of {', '.join(suffixes)}: narrow the glob or rename it.")
    root = Path(os.path.commonpath([path.resolve().parent for path in ordered]))
    return [(path, path.resolve().relative_to(root).as_posix()) for path in ordered]


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What is read within fails with one sentence.

    Raises:
        CorpusError: the file is empty or cannot be read.
    """
    try:
        if path.stat().st_size == 0:
            raise CorpusError(f"{FILES_KEY}: {path} is empty: remove it or give files that hold something.")
        yield
    except OSError as error:
        raise CorpusError(
            f"{FILES_KEY}: {path} cannot be read ({error.strerror or error}): check that it is yours to read."
        ) from error
