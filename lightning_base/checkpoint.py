"""Checkpoints that are either whole or not there, and that are checked before they are used."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO
from lightning_fabric.utilities.types import _PATH


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, cut short or altered."""


class VerifiedCheckpointIO(CheckpointIO):
    """Writes beside the target, syncs, moves into place, and keeps a SHA-256 in a sidecar ``<file>.sha256``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            # The sidecar goes first: a checkpoint that is in place always has the sum to hold it against.
            _sidecar(target).write_text(_sha256(temporary) + "\n")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load_checkpoint(
        self, path: _PATH, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint.

        Raises:
            CheckpointError: it is not there, or not what was written.
        """
        target = Path(path)
        problem = verify(target)
        if problem:
            raise CheckpointError(problem)
        loaded: dict[str, Any] = torch.load(target, map_location=map_location or "cpu", weights_only=True)
        return loaded

    def remove_checkpoint(self, path: _PATH) -> None:
        target = Path(path)
        target.unlink(missing_ok=True)
        _sidecar(target).unlink(missing_ok=True)


def verify(path: Path) -> str | None:
    """One sentence about what is wrong with a checkpoint file; None if it is what was written."""
    if not path.is_file():
        return f"the checkpoint {path} does not exist"
    sidecar = _sidecar(path)
    if not sidecar.is_file():
        return f"the checkpoint {path} has no {sidecar.name} beside it to hold it against"
    if _sha256(path) != sidecar.read_text().strip():
        return f"the checkpoint {path} is not what was written: its SHA-256 differs from {sidecar.name}"
    return None


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder that is whole; None if there is none."""
    found = sorted(folder.glob("step_*.ckpt"), key=lambda path: int(path.stem.split("_")[1]), reverse=True)
    return next((path for path in found if verify(path) is None), None)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
