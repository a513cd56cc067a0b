"""A checkpoint on the disk.

It is a folder ``step_N.ckpt``: ``state.pt``, which is Lightning's own; where experts are spread over ranks
``experts_A-B.pt`` with those from A to below B, taken out of it; and ``checksums.json``, written last. Every part is a
file of ``torch.save``. The folder is written under another name, synced, and moved into its place.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch

FORMAT = 1
STATE, CHECKSUMS = "state.pt", "checksums.json"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, cut short, altered or could not be written; one sentence says which."""


def open_temporary(target: Path) -> Path:
    """A new folder beside the place of a checkpoint, to write its parts into."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def write_part(temporary: Path, name: str, content: Any) -> dict[str, Any]:
    """Writes one file of a checkpoint, synced; gives what ``commit`` has to know about it.

    Raises:
        OSError: it cannot be written.
    """
    with open(temporary / name, "wb") as file:
        hashed = _Hashed(file)
        try:
            torch.save(content, cast(IO[bytes], hashed))
            file.flush()
            os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            with suppress(OSError):  # closing would try once more
                file.close()
            # torch says "unexpected pos" about whatever happened to a file, and Python does not say to which.
            cause = hashed.error or error
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(temporary / name)) from None
            raise
    return {"name": name, "bytes": hashed.bytes, "sha256": hashed.digest.hexdigest()}


def commit(temporary: Path, target: Path, parts: Collection[Mapping[str, Any]], **facts: Any) -> None:
    """Writes the checksums and moves the folder into its place, all of it or nothing.

    Args:
        temporary: with all parts in it.
        target: its place; what is there is replaced.
        parts: what ``write_part`` gave, of all ranks.
        facts: what else ``checksums.json`` is to say, such as the number of ranks.
    """
    listed = {part["name"]: {key: part[key] for key in ("bytes", "sha256")} for part in parts}
    with open(temporary / CHECKSUMS, "w") as file:
        json.dump({"format": FORMAT, **facts, "parts": listed}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(temporary)
    old = _set_aside(target)
    os.rename(temporary, target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Removes a checkpoint, at once and not file by file."""
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def verify(path: Path) -> str | None:
    """One sentence about what is wrong with a checkpoint; None if it is what was written."""
    if path.is_file():
        return f"the checkpoint {path} is a single file, as earlier versions wrote them: train the run again"
    if not path.is_dir():
        return f"the checkpoint {path} does not exist"
    try:
        parts = read_facts(path)["parts"]
        if STATE not in parts:
            return f"the checkpoint {path} is damaged: its {CHECKSUMS} lists no {STATE}"
        for name, part in parts.items():
            file = path / Path(name).name
            if not file.is_file():
                return f"the checkpoint {path} is damaged: {name} is missing"
            size = file.stat().st_size
            if size != part["bytes"]:
                return f"the checkpoint {path} is damaged: {name} has {size:,} bytes instead of {part['bytes']:,}"
            if _sha256(file) != part["sha256"]:
                return f"the checkpoint {path} is damaged: {name} is not what was written, its SHA-256 differs"
    except CheckpointError as error:
        return str(error)
    except (OSError, TypeError, KeyError, AttributeError, ValueError) as error:
        return f"the checkpoint {path} cannot be read ({type(error).__name__}: {error})"
    return None


def read_facts(path: Path) -> dict[str, Any]:
    """What ``checksums.json`` says.

    Raises:
        CheckpointError: it cannot be read, or is of another version's format.
    """
    try:
        facts: dict[str, Any] = json.loads((path / CHECKSUMS).read_text())
        version = facts["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: its {CHECKSUMS} cannot be read ({error})") from error
    if version != FORMAT:
        raise CheckpointError(f"the checkpoint {path} is in format {version}, and this version reads format {FORMAT}")
    return facts


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first."""
    return sorted(folder.glob("step_*.ckpt"), key=step_of, reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder that is whole; None if there is none."""
    return next((path for path in checkpoints(folder) if verify(path) is None), None)


def step_of(path: Path) -> int:
    """The optimizer step after which a checkpoint was saved, by its name; -1 for another name."""
    number = path.stem.partition("_")[2]
    return int(number) if number.isdecimal() else -1


def what_is_safe(folder: Path, but: Path | None = None) -> str:
    """What there is to go back to in a folder when something could not be written."""
    safe = next((path for path in checkpoints(folder) if path != but and verify(path) is None), None)
    if safe is None:
        return "no checkpoint was saved before. Make room, and start the same command again"
    return f"{safe} is whole. Make room, and the same command goes on from there"


def sweep_temporaries(folder: Path) -> None:
    """Removes what a save that was killed has left."""
    for left in folder.glob(".step_*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


class _Hashed:
    """A file that hashes what is written, and keeps the error that torch.save would hide."""

    def __init__(self, file: Any) -> None:
        self._file, self.digest, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """``write_part`` flushes, where an error is seen."""


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}")


def _set_aside(path: Path) -> Path:
    """Renames a checkpoint, if there is one; gives its new place."""
    aside = _beside(path).with_suffix(".old")
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(path, aside)
    return aside


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
