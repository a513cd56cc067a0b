"""Saving from all ranks at once, as Lightning calls it."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning_fabric.plugins import CheckpointIO
from lightning_fabric.utilities.types import _PATH
from pytorch_lightning.strategies import Strategy

from lightning_base.distributed.reduction import over_ranks, rank, world_size
from lightning_base.program.checkpoint.files import (
    STATE,
    CheckpointError,
    commit,
    open_temporary,
    remove,
    verify,
    what_is_safe,
    write_part,
)
from lightning_base.program.checkpoint.load import load
from lightning_base.program.disk import full_disk

T = TypeVar("T")


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's way to these checkpoints, for a single process."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        target = Path(path)
        temporary = open_temporary(target)
        commit(temporary, target, [write_part(temporary, STATE, checkpoint)])

    def load_checkpoint(
        self, path: _PATH, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint onto the CPU.

        Raises:
            CheckpointError: it is not there, or not what was written.
        """
        problem = verify(Path(path))
        if problem:
            raise CheckpointError(problem)
        return load(Path(path))

    def remove_checkpoint(self, path: _PATH) -> None:
        remove(Path(path))


class SavesTogether(Strategy):
    """To be mixed into a strategy: all ranks take part in a save, and an error of one ends all.

    In Lightning's own the first rank writes while the others wait at a barrier, until a time-out if it fails.
    """

    def expert_parts(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The files that this rank writes beside ``state.pt``; takes out of ``checkpoint`` what is in any of them.

        Where experts are sharded: ``{"experts_4-8.pt": {"experts": [4, 8], "parameters": {name: tensor}, "moments":
        {name: {"exp_avg": tensor, "exp_avg_sq": tensor, "step": tensor}}}}``, with the names of the state dict.
        """
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        parts = self.expert_parts(checkpoint)
        if self.is_global_zero:
            parts[STATE] = checkpoint
        write(Path(filepath), parts, world_size=world_size(), strategy=type(self).__name__)


def write(target: Path, parts: Mapping[str, Any], **facts: Any) -> None:
    """Writes a checkpoint from all ranks at once; every rank has to call it, and all fail if one does.

    Args:
        target: the checkpoint.
        parts: the files that this rank writes by their names: ``state.pt`` on the first rank.
        facts: what else ``checksums.json`` is to say; those of the first rank count.

    Raises:
        CheckpointError: a part cannot be written, on whichever rank; what was in ``target`` is as it was.
    """
    first = rank() == 0
    what = f"the checkpoint {target} cannot be written"
    temporary = None
    try:
        temporary = on_all_ranks(lambda: open_temporary(target) if first else None, what)[0]
        assert temporary is not None
        written = on_all_ranks(lambda: [write_part(temporary, name, content) for name, content in parts.items()], what)
        known = [part for of_rank in written for part in of_rank]
        on_all_ranks(lambda: commit(temporary, target, known, **facts) if first else None, what)
    except CheckpointError as error:
        if first and temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{error}; {what_is_safe(target.parent, but=target)}") from error.__cause__


def on_all_ranks(action: Callable[[], T], what: str) -> list[T]:
    """What an action gives on every rank; every rank has to call it.

    Raises:
        CheckpointError: it failed on one rank, which all of them learn.
    """
    value, problem, cause = None, None, None
    try:
        value = action()
    except Exception as error:
        cause = error
        problem = f"{full_disk(error) or f'{type(error).__name__}: {error}'}"
    outcomes: list[Any] = over_ranks((value, problem))
    for which, (_, said) in enumerate(outcomes):
        if said:
            where = f" on rank {which}" if len(outcomes) > 1 else ""
            raise CheckpointError(f"{what}{where}: {said}") from cause
    return [found for found, _ in outcomes]
