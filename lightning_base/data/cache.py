"""A folder that is built once, whole or not at all, however many processes ask for it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_base.data.corpus import CorpusError

CHECKSUMS = "checksums.json"


def build_once(folder: Path, build: Callable[[Path], None], timeout: float) -> None:
    """Sees to it that `folder` holds what `build` writes, building it if it is missing or damaged.

    Args:
        folder: where the result lies; its parent is created.
        build: writes the files into the empty folder it is given.
        timeout: seconds to wait for another process that is building the same folder.

    Raises:
        CorpusError: the parent cannot be written to, or the other process takes longer than `timeout`.
    """
    if verified(folder):
        return
    lock_file = folder.parent / f"{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock_file, timeout=timeout):
            # Another process may have built it while this one waited for the lock.
            if not verified(folder):
                _build(folder, build)
    except Timeout:
        raise CorpusError(
            f"data.cache_dir={folder.parent}: another process has been preparing this corpus for over {timeout:.0f} "
            f"seconds: wait for it, or end it if it hangs (it holds {lock_file})."
        ) from None
    except OSError as error:
        raise CorpusError(
            f"data.cache_dir={folder.parent} cannot be written to ({error.strerror or error}): "
            "name a folder that is yours, on a disk with space left."
        ) from error


def verified(folder: Path) -> bool:
    """Whether every file that belongs into `folder` is there and is what it was when it was written."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        return bool(checksums) and all(_sha256(folder / name) == expected for name, expected in checksums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    # Left over from a process that was killed: nobody else is building, for the lock is ours.
    for rubble in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(rubble)
    partial = folder.parent / f"{folder.name}.partial-{os.getpid()}"
    damaged = folder.parent / f"{folder.name}.partial-{os.getpid()}-damaged"
    partial.mkdir()
    try:
        build(partial)
        checksums = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / CHECKSUMS).write_text(json.dumps(checksums, indent=2))
        for path in partial.iterdir():
            _flush(path)
        if folder.exists():
            # Moved aside, not emptied: a process that has it open goes on reading what it opened.
            os.replace(folder, damaged)
        os.replace(partial, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
