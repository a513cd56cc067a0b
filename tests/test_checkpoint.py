"""A checkpoint is what was written, or it is not loaded."""

from pathlib import Path

import pytest
import torch

from lightning_base.checkpoint import CheckpointError, VerifiedCheckpointIO


def test_what_was_written_is_loaded_and_what_was_altered_since_is_not(tmp_path: Path) -> None:
    files, path = VerifiedCheckpointIO(), tmp_path / "step_1.ckpt"
    weights = torch.arange(1000.0)
    files.save_checkpoint({"weights": weights}, path)
    assert torch.equal(files.load_checkpoint(path)["weights"], weights)

    content = bytearray(path.read_bytes())
    # One byte of one weight: the file can still be read.
    place = content.index(weights.numpy().tobytes())
    content[place + 400] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not what was written"):
        files.load_checkpoint(path)
