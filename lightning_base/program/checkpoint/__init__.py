"""Checkpoints that are either whole or not there, and that are checked before they are used."""

from lightning_base.program.checkpoint.files import (
    FORMAT,
    STATE,
    CheckpointError,
    checkpoints,
    commit,
    newest,
    open_temporary,
    step_of,
    sweep_temporaries,
    verify,
    what_is_safe,
    write_part,
)
from lightning_base.program.checkpoint.load import PARAMETER_NAMES, expert_part, load
from lightning_base.program.checkpoint.together import SavesTogether, VerifiedCheckpointIO, on_all_ranks, write

__all__ = [
    "FORMAT",
    "PARAMETER_NAMES",
    "STATE",
    "CheckpointError",
    "SavesTogether",
    "VerifiedCheckpointIO",
    "checkpoints",
    "commit",
    "expert_part",
    "load",
    "newest",
    "on_all_ranks",
    "open_temporary",
    "step_of",
    "sweep_temporaries",
    "verify",
    "what_is_safe",
    "write",
    "write_part",
]
