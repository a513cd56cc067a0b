"""A checkpoint is what was written, or it is not loaded."""

import copy
import errno
import itertools
import json
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import torch.distributed as dist
from tiny_training import leave
from torch import nn

from lightning_base.program.checkpoint import (
    PARAMETER_NAMES,
    STATE,
    CheckpointError,
    VerifiedCheckpointIO,
    checkpoints,
    expert_part,
    load,
    newest,
    sweep_temporaries,
    verify,
    write,
)

NAMES = ["norm.weight", "experts.w1"]
EXPERTS = 6


def test_what_was_written_is_loaded_and_what_was_altered_since_is_not(tmp_path: Path) -> None:
    files, path = VerifiedCheckpointIO(), tmp_path / "step_1.ckpt"
    weights = torch.arange(1000.0)
    files.save_checkpoint({"weights": weights}, path)
    assert torch.equal(files.load_checkpoint(path)["weights"], weights)

    content = bytearray((path / STATE).read_bytes())
    # One byte of one weight: the file can still be read.
    place = content.index(weights.numpy().tobytes())
    content[place + 400] ^= 1
    (path / STATE).write_bytes(content)
    with pytest.raises(CheckpointError, match="is not what was written"):
        files.load_checkpoint(path)


def trained() -> dict[str, Any]:
    """A checkpoint of a model with six experts after two steps of Adam, as one process has it."""
    generator = torch.Generator().manual_seed(0)
    parameters = {
        NAMES[0]: torch.randn(3, generator=generator),
        NAMES[1]: torch.randn(EXPERTS, 3, 2, generator=generator),
    }
    module = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(value) for name, value in parameters.items()})
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(2):
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    state = {name: parameter.detach() for name, parameter in zip(NAMES, module.parameters(), strict=True)}
    return {"state_dict": state, "optimizer_states": [optimizer.state_dict()], PARAMETER_NAMES: [NAMES]}


def sharded(whole: dict[str, Any], bounds: list[int]) -> dict[str, Any]:
    """The files of the same checkpoint, with the experts between two bounds in a file each."""
    rest = copy.deepcopy(whole)
    rows, moments = rest["state_dict"].pop(NAMES[1]), rest["optimizer_states"][0]["state"].pop(1)
    parts = {STATE: rest}
    for a, b in itertools.pairwise(bounds):
        kept = {key: value[a:b].clone() if value.ndim else value for key, value in moments.items()}
        of_part = {"experts": [a, b], "parameters": {NAMES[1]: rows[a:b].clone()}, "moments": {NAMES[1]: kept}}
        parts[expert_part(range(a, b))] = of_part
    return parts


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("bounds", [[0, 6], [0, 3, 6], [0, 2, 4, 6], [0, 1, 6]])
def test_experts_saved_by_any_number_of_ranks_are_loaded_as_if_one_process_had_saved_them(
    bounds: list[int], tmp_path: Path
) -> None:
    whole, path = trained(), tmp_path / "step_2.ckpt"
    write(path, sharded(whole, bounds))
    assert verify(path) is None
    assert_equal(load(path), whole)


@pytest.mark.parametrize("bounds", [None, [0, 3, 6], [0, 1, 6]])
@pytest.mark.parametrize("wanted", [range(2), range(2, 4), range(1, 6)])
def test_any_experts_can_be_loaded_alone_with_their_moments(
    bounds: list[int] | None, wanted: range, tmp_path: Path
) -> None:
    whole, path = trained(), tmp_path / "step_2.ckpt"
    write(path, sharded(whole, bounds) if bounds else {STATE: whole})
    found = load(path, names=[NAMES[1]], experts=wanted)
    rows = slice(wanted.start, wanted.stop)
    assert torch.equal(found["state_dict"][NAMES[1]], whole["state_dict"][NAMES[1]][rows])
    assert torch.equal(found["state_dict"][NAMES[0]], whole["state_dict"][NAMES[0]])
    expected, moments = whole["optimizer_states"][0]["state"], found["optimizer_states"][0]["state"]
    assert torch.equal(moments[1]["exp_avg_sq"], expected[1]["exp_avg_sq"][rows])
    assert torch.equal(moments[1]["step"], torch.tensor(2.0))
    assert_equal(moments[0], expected[0])


@pytest.mark.parametrize("missing", ["experts_0-3.pt", "experts_3-6.pt"])
def test_parts_that_leave_a_gap_are_not_a_checkpoint(missing: str, tmp_path: Path) -> None:
    parts = sharded(trained(), [0, 3, 6, 9])
    del parts[missing]
    write(tmp_path / "step_2.ckpt", parts)
    with pytest.raises(CheckpointError, match="with gaps, or twice"):
        load(tmp_path / "step_2.ckpt")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def truncate(path: Path) -> None:
    os.truncate(path / STATE, (path / STATE).stat().st_size - 100)


def lose_a_part(path: Path) -> None:
    (path / STATE).unlink()


def lose_the_checksums(path: Path) -> None:
    (path / "checksums.json").unlink()


def cut_the_checksums(path: Path) -> None:
    os.truncate(path / "checksums.json", 40)


def come_from_the_future(path: Path) -> None:
    text = (path / "checksums.json").read_text()
    (path / "checksums.json").write_text(text.replace('"format": 1', '"format": 2'))


def be_a_list(path: Path) -> None:
    (path / "checksums.json").write_text(json.dumps([1]))


DAMAGES = {
    truncate: r"state.pt has [\d,]+ bytes instead of [\d,]+",
    lose_a_part: "state.pt is missing",
    lose_the_checksums: "checksums.json cannot be read",
    cut_the_checksums: "checksums.json cannot be read",
    be_a_list: "checksums.json cannot be read",
    come_from_the_future: "is in format 2, and this version reads format 1",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_wrong_with_a_checkpoint_is_said_and_the_one_before_is_the_newest(damage: Any, tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path / f"step_{step}.ckpt", {STATE: trained()})
    assert newest(tmp_path) == tmp_path / "step_10.ckpt"
    damage(tmp_path / "step_10.ckpt")
    with pytest.raises(CheckpointError, match=DAMAGES[damage]):
        VerifiedCheckpointIO().load_checkpoint(tmp_path / "step_10.ckpt")
    assert newest(tmp_path) == tmp_path / "step_2.ckpt"
    assert [path.name for path in checkpoints(tmp_path)] == ["step_10.ckpt", "step_2.ckpt", "step_1.ckpt"]


def test_a_hostile_checkpoint_with_right_checksums_runs_nothing(tmp_path: Path) -> None:
    path, marker = tmp_path / "step_1.ckpt", tmp_path / "it_ran"
    write(path, {STATE: {"state_dict": Bomb(marker)}})
    assert verify(path) is None
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(path)
    assert not marker.exists()
    # The bomb is one: pickle alone, as torch.distributed.checkpoint reads its .metadata, sets it off.
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()


def test_what_a_killed_save_has_left_is_swept_and_checkpoints_stay(tmp_path: Path) -> None:
    write(tmp_path / "step_1.ckpt", {STATE: {}})
    (tmp_path / ".step_2.ckpt.host.17").mkdir()
    (tmp_path / ".step_2.ckpt.host.17" / STATE).write_bytes(b"half")
    (tmp_path / ".step_3.ckpt.17").write_bytes(b"half")
    sweep_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1.ckpt"]


@pytest.mark.parametrize("room", [0, 5_000, 39_000])
def test_a_save_without_room_says_so_names_what_is_safe_and_leaves_nothing_behind(room: int, tmp_path: Path) -> None:
    content = {"weights": torch.zeros(10_000)}
    write(tmp_path / "step_1.ckpt", {STATE: content})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(CheckpointError) as failed:
            write(tmp_path / "step_2.ckpt", {STATE: content})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step_2.ckpt cannot be written: the limit for the size of a file is reached" in str(failed.value)
    assert f"{tmp_path}/step_1.ckpt is whole" in str(failed.value)
    assert isinstance(failed.value.__cause__, OSError)
    assert failed.value.__cause__.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["step_1.ckpt"]


def save_on_two_ranks(rank: int, folder: str) -> None:
    """Each rank writes its experts; then the second one finds no room for its own."""
    path = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    whole = trained()
    files = list(sharded(whole, [0, 3, 6]).items())
    mine = dict([files[0], files[1]] if rank == 0 else [files[2]])
    write(path / "step_2.ckpt", mine, world_size=2)
    dist.barrier()
    assert verify(path / "step_2.ckpt") is None
    assert_equal(load(path / "step_2.ckpt"), whole)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(CheckpointError) as failed:
        write(path / "step_4.ckpt", mine, world_size=2)
    assert "step_4.ckpt cannot be written on rank 1: the limit for the size of a file is reached" in str(failed.value)
    assert f"{path}/step_2.ckpt is whole" in str(failed.value)
    dist.barrier()
    assert sorted(each.name for each in path.glob("*step*")) == ["step_2.ckpt"]
    leave()


def test_ranks_write_a_checkpoint_together_and_fail_together(tmp_path: Path) -> None:
    forks.call_on_two_ranks(save_on_two_ranks, str(tmp_path))
