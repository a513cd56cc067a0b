"""Damaged, hostile and strange checkpoints: passed over with the reason, and never the silent loss of a run."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import program
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_base.program.checkpoint import STATE, write

ARGUMENTS = (
    "router=uniform",
    "trainer.max_steps=6",
    "trainer.keep_checkpoints=null",
    "trainer.progress_bar=false",
    "logger.tensorboard=false",
)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def finished(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done, with checkpoints after steps 2, 4 and 6."""
    run = tmp_path_factory.mktemp("finished") / "run"
    done = program.train(*small_corpus, *ARGUMENTS, f"hydra.run.dir={run}")
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it as a kill in its final evaluation would have left it."""
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    status = program.read(copy / "status.json")
    (copy / "status.json").write_text(json.dumps({**status, "state": "running"}))
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_newest_that_can_be_loaded_is_gone_on_from_and_the_others_are_named(
    small_corpus: list[str], run: Path, finished: Path
) -> None:
    checkpoints, marker = run / "checkpoints", run / "it_ran"
    good = program.state(checkpoints / "step_6.ckpt")
    write(checkpoints / "step_6.ckpt", {STATE: {**good, "loops": Bomb(marker)}})
    good["state_dict"].popitem()
    write(checkpoints / "step_4.ckpt", {STATE: good})
    # Such as a killed save leaves them.
    (checkpoints / ".step_6.ckpt.host.1").mkdir()

    done = program.train(*small_corpus, *ARGUMENTS, f"hydra.run.dir={run}")
    assert done.returncode == 0, done.stderr
    assert not marker.exists()
    reasons = [
        line.partition("passing over a checkpoint: ")[2] for line in done.stderr.splitlines() if "passing" in line
    ]
    assert len(reasons) == 2
    assert reasons[0].startswith(f"the checkpoint {checkpoints}/step_6.ckpt cannot be loaded (UnpicklingError:")
    assert reasons[1].startswith(f"the checkpoint {checkpoints}/step_4.ckpt is one of another model:")
    assert f"going on from {checkpoints}/step_2.ckpt" in done.stderr
    (resume,) = program.read(run / "manifest.json")["resumes"]
    assert resume["step"] == 2
    assert [passed["reason"] for passed in resume["passed_over"]] == reasons
    for name in ("train/loss", "validation/loss", "final/loss"):
        assert program.series(run, name) == program.series(finished, name)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_2.ckpt", "step_4.ckpt", "step_6.ckpt"]


def test_if_none_is_left_the_run_stops_and_starts_over_only_if_told_to(
    small_corpus: list[str], run: Path, finished: Path
) -> None:
    for path in (run / "checkpoints").iterdir():
        os.truncate(path / STATE, 1000)
    before = contents(run)
    done = program.train(*small_corpus, *ARGUMENTS, f"hydra.run.dir={run}")
    assert done.returncode == 2
    assert f"error: no checkpoint in {run}/checkpoints can be used: " in done.stderr
    assert done.stderr.count("state.pt has 1,000 bytes instead of") == 3
    assert done.stderr.rstrip().endswith("Start over with resume=never")
    assert contents(run) == before

    again = program.train(*small_corpus, *ARGUMENTS, "resume=never", f"hydra.run.dir={run}")
    assert again.returncode == 0, again.stderr
    for name in ("train/loss", "validation/loss", "final/loss"):
        assert program.series(run, name) == program.series(finished, name)
    assert "resumes" not in program.read(run / "manifest.json")


def test_a_run_can_start_from_a_checkpoint_of_another(small_corpus: list[str], finished: Path, tmp_path: Path) -> None:
    given, run = finished / "checkpoints" / "step_4.ckpt", tmp_path / "run"
    board = ("logger.tensorboard=true", f"hydra.run.dir={run}")
    done = program.train(*small_corpus, *ARGUMENTS, f"resume={given}", *board)
    assert done.returncode == 0, done.stderr
    # A run that goes on has the cards of its beginning; this one begins.
    assert "certificate/text_summary" in EventAccumulator(str(run / "tensorboard")).Reload().Tags()["tensors"]
    # The validation of step 4 comes after its checkpoint.
    assert program.series(run, "train/loss") == program.series(finished, "train/loss")[4:]
    assert program.series(run, "validation/loss") == program.series(finished, "validation/loss")[1:]
    before, after = (program.read(path / "manifest.json") for path in (finished, run))
    assert after["started_from"] == {"checkpoint": str(given), "step": 4}
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
    given: str, sentence: str, small_corpus: list[str], run: Path, tmp_path: Path
) -> None:
    target = run if "{run}" in given else tmp_path / "new"
    arguments = (*ARGUMENTS, f"resume={given.format(run=run)}", f"hydra.run.dir={target}")
    done = program.train(*small_corpus, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
