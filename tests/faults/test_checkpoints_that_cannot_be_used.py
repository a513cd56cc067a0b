"""Damaged, hostile and strange checkpoints: passed over with the reason, and never the silent loss of a run."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import program
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_interruption import wait_until_gone

from lightning_base.program.checkpoint import STATE, write
from lightning_base.program.checkpoint.files import CHECKSUMS

ARGUMENTS = (
    "router=partly_blind",
    "trainer.max_steps=9",
    "trainer.checkpoint_every_n_steps=1",
    "trainer.validate_every_n_steps=3",
    "trainer.keep_checkpoints=null",
    "trainer.progress_bar=false",
    "logger.tensorboard=false",
)
DDP = ("strategy=ddp", "trainer.devices=2", "strategy.timeout_seconds=120")
SHARED_EXPERTS = ("strategy=expert_parallel", *DDP[1:])
LAYOUTS = {"one rank": (), "ddp": DDP, "expert_parallel": SHARED_EXPERTS}
SOME = ["one rank", pytest.param("ddp", marks=pytest.mark.exhaustive)]
ROUTER = '''
import os

from lightning_base.program import resume
from lightning_base.routing.uniform import Uniform

verify = resume.verify


def verify_or_not(path):
    if path.name == "step_9.ckpt" and os.environ.get("RANK") == "1":
        return f"the checkpoint {path} cannot be read (OSError: [Errno 5] Input/output error)"
    return verify(path)


class PartlyBlind(Uniform):
    """Round-robin. Rank 1, if there is one, cannot read one of the files: such as from a disk of its node."""

    resume.verify = verify_or_not
'''


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routers")
    (folder / "partly_blind.py").write_text(ROUTER)
    (folder / "router").mkdir()
    yaml = "_target_: lightning_base.routing.partly_blind.PartlyBlind\nnum_experts: 8\n"
    (folder / "router" / "partly_blind.yaml").write_text(yaml)
    return folder


Train = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def train(small_corpus: list[str], routers: Path) -> Train:
    return lambda run, *more: program.train(*small_corpus, *ARGUMENTS, *more, f"hydra.run.dir={run}", routers=routers)


@pytest.fixture(scope="module")
def finished(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run that is done, with a checkpoint after each of nine steps; trained once for each layout."""

    @cache
    def in_layout(layout: str) -> Path:
        run = tmp_path_factory.mktemp("finished") / "run"
        done = train(run, *LAYOUTS[layout])
        assert done.returncode == 0, done.stderr
        return run

    return in_layout


def killed(finished: Path, folder: Path) -> Path:
    """A copy of a run as a kill in its final evaluation would have left it."""
    copy = Path(shutil.copytree(finished, folder / "run"))
    status = program.read(copy / "status.json")
    (copy / "status.json").write_text(json.dumps({**status, "state": "running"}))
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("layout", [*SOME, "expert_parallel"])
def test_all_ranks_go_on_from_the_newest_that_can_be_used_and_the_others_are_named(
    layout: str, train: Train, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    run = killed(finished(layout), tmp_path)
    marker = run / "it_ran"
    paths = {step: run / "checkpoints" / f"step_{step}.ckpt" for step in range(1, 10)}
    parts = sorted(path.name for path in paths[9].glob("*.pt"))
    whole = {name: torch.load(paths[9] / name, weights_only=True) for name in parts}
    state = whole[STATE]
    assert parts == ([f"experts_{held}.pt" for held in ("0-4", "4-8")] if layout == "expert_parallel" else []) + [STATE]
    reasons = {}
    if layout == "one rank":
        os.truncate(paths[9] / CHECKSUMS, 20)
        reasons[9] = "is damaged: its checksums.json cannot be read (Unterminated string"
    else:
        reasons[9] = "cannot be read (OSError: [Errno 5] Input/output error), on rank 1"
    os.truncate(paths[8] / parts[-1], 1000)
    reasons[8] = f"is damaged: {parts[-1]} has 1,000 bytes instead of "
    flipped = bytearray((paths[7] / parts[0]).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (paths[7] / parts[0]).write_bytes(flipped)
    reasons[7] = f"is damaged: {parts[0]} is not what was written, its SHA-256 differs"
    facts = json.loads((paths[6] / CHECKSUMS).read_text())
    (paths[6] / CHECKSUMS).write_text(json.dumps({**facts, "format": 99}))
    reasons[6] = "is in format 99, and this version reads format 1"
    (paths[5] / parts[0]).unlink()
    reasons[5] = f"is damaged: {parts[0]} is missing"
    # With checksums that are right.
    write(paths[4], {**whole, STATE: {**state, "loops": Bomb(marker)}})
    reasons[4] = "cannot be loaded (UnpicklingError: "
    if layout == "expert_parallel":
        write(paths[3], {name: part for name, part in whole.items() if name != parts[1]})
    else:
        write(paths[3], {STATE: {**state, "state_dict": dict(list(state["state_dict"].items())[1:])}})
    reasons[3] = "is one of another model: "
    write(paths[2], {**whole, STATE: {name: value for name, value in state.items() if name != "loops"}})
    reasons[2] = "does not hold loops: nothing can go on from it"
    # Such as a killed save leaves them.
    (run / "checkpoints" / ".step_6.ckpt.host.1").mkdir()

    done = train(run, *LAYOUTS[layout])
    assert done.returncode == 0, done.stderr
    assert not marker.exists()
    said = [line.partition("passing over a checkpoint: ")[2] for line in done.stderr.splitlines() if "passing" in line]
    assert len(said) == 8, said
    for sentence, (step, reason) in zip(said, reasons.items(), strict=True):
        assert sentence.startswith(f"the checkpoint {paths[step]} {reason}"), sentence
    assert f"going on from {paths[1]}" in done.stderr
    (resume,) = program.read(run / "manifest.json")["resumes"]
    assert resume["step"] == 1
    assert [passed["reason"] for passed in resume["passed_over"]] == said
    for name in ("train/loss", "validation/loss", "final/loss"):
        assert program.series(run, name) == program.series(finished(layout), name)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {path.name for path in paths.values()}


@pytest.mark.parametrize("layout", [*SOME, pytest.param("expert_parallel", marks=pytest.mark.exhaustive)])
def test_if_none_is_left_the_run_stops_and_starts_over_only_if_told_to(
    layout: str, train: Train, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    run = killed(finished(layout), tmp_path)
    for path in (run / "checkpoints").iterdir():
        os.truncate(path / STATE, 1000)
    before = contents(run)
    done = train(run, *LAYOUTS[layout])
    assert done.returncode == 2
    assert f"error: no checkpoint in {run}/checkpoints can be used: " in done.stderr
    assert done.stderr.count("state.pt has 1,000 bytes instead of") == 9
    assert done.stderr.rstrip().endswith("Start over with resume=never")
    assert contents(run) == before

    again = train(run, *LAYOUTS[layout], "resume=never")
    assert again.returncode == 0, again.stderr
    for name in ("train/loss", "validation/loss", "final/loss"):
        assert program.series(run, name) == program.series(finished(layout), name)
    assert "resumes" not in program.read(run / "manifest.json")


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_if_none_that_is_whole_can_be_loaded_every_rank_stops(
    layout: str, train: Train, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    run, marker = killed(finished(layout), tmp_path), tmp_path / "it_ran"
    for path in (run / "checkpoints").iterdir():
        write(path, {STATE: Bomb(marker)})
    logs = {path.name: path.read_bytes() for path in run.glob("*.csv")}
    done = train(run, *LAYOUTS[layout])
    assert done.returncode == 1
    error = program.read(run / "status.json")["error"]
    assert error.startswith(f"ConfigError: no checkpoint in {run}/checkpoints can be used: ")
    assert error.count("cannot be loaded (UnpicklingError: ") == 9
    assert error.endswith("Start over with resume=never")
    assert not marker.exists()
    assert {path.name: path.read_bytes() for path in run.glob("*.csv")} == logs
    assert wait_until_gone(run) == []


def test_a_run_can_start_from_a_checkpoint_of_another(
    train: Train, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    given, run = finished("one rank") / "checkpoints" / "step_3.ckpt", tmp_path / "run"
    done = train(run, f"resume={given}", "logger.tensorboard=true")
    assert done.returncode == 0, done.stderr
    # A run that goes on has the cards of its beginning; this one begins.
    assert "certificate/text_summary" in EventAccumulator(str(run / "tensorboard")).Reload().Tags()["tensors"]
    # The validation of step 3 comes after its checkpoint.
    assert program.series(run, "train/loss") == program.series(finished("one rank"), "train/loss")[3:]
    assert program.series(run, "validation/loss") == program.series(finished("one rank"), "validation/loss")
    before, after = (program.read(path / "manifest.json") for path in (finished("one rank"), run))
    assert after["started_from"] == {"checkpoint": str(given), "step": 3}
    assert (after["batch_fingerprint"], after["tokens"]) == (before["batch_fingerprint"], before["tokens"])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("nowhere/step_4.ckpt", "resume=nowhere/step_4.ckpt: the checkpoint nowhere/step_4.ckpt does not exist; give"),
        (
            "{run}/checkpoints/step_4.ckpt",
            "step_4.ckpt is a checkpoint of this very run, which goes on from its newest",
        ),
    ],
)
def test_a_checkpoint_that_a_run_cannot_start_from_is_refused(
    given: str, sentence: str, train: Train, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    run = killed(finished("one rank"), tmp_path)
    done = train(run if "{run}" in given else tmp_path / "new", f"resume={given.format(run=run)}")
    assert done.returncode == 2
    assert sentence in done.stderr


def test_a_checkpoint_of_a_model_with_more_experts_is_refused(
    train: Train, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    given = finished("one rank") / "checkpoints" / "step_4.ckpt"
    done = train(tmp_path / "run", f"resume={given}", "router.num_experts=4")
    assert done.returncode == 1
    assert (
        "step_4.ckpt is one of another model: model.blocks.layer_1.feed_forward.experts.w1.0 does not fit"
        in done.stderr
    )
