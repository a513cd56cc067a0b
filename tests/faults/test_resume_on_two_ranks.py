"""A job of two ranks is told to stop and goes on: totals, losses and recorded plans as if nobody had interrupted it.

Or a rank of it is killed, and torchrun starts all of them anew.
"""

import os
import signal
from pathlib import Path

import numpy as np
import program
import pytest
from test_interruption import rank_processes, wait_for_step, wait_until_gone

STEPS = 32
ARGUMENTS = (
    "router=switch",
    "router.capacity_factor=0.75",
    "trainer.devices=2",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_n_steps=4",
    "trainer.checkpoint_every_n_steps=10",
    "trainer.validate_every_n_steps=16",
    "trainer.record_plans=true",
)


@pytest.fixture(scope="module", params=["expert_parallel", pytest.param("ddp", marks=pytest.mark.exhaustive)])
def strategy(request: pytest.FixtureRequest) -> str:
    return f"strategy={request.param}"


@pytest.fixture(scope="module")
def undisturbed(strategy: str, small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = program.train(*small_corpus, *ARGUMENTS, strategy, f"runs_dir={folder}")
    assert done.returncode == 0, done.stderr
    return program.only_job(folder)


@pytest.fixture(scope="module")
def resumed(strategy: str, small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, which got SIGTERM between two checkpoints and was started again."""
    folder = tmp_path_factory.mktemp("resumed")
    arguments = (*small_corpus, *ARGUMENTS, strategy, f"runs_dir={folder}")
    process = program.start(*arguments)
    directory = wait_for_step(folder, 8, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert program.read(directory / "status.json")["state"] == "preempted"
    assert program.series(directory, "train/loss")[-1][0] < STEPS

    again = program.train(*arguments)
    assert again.returncode == 0, again.stderr
    return directory


def test_totals_are_those_of_all_ranks_and_all_steps(undisturbed: Path, resumed: Path) -> None:
    expected, found = (program.read(path / "manifest.json") for path in (undisturbed, resumed))
    for field in (
        "tokens",
        "assignments",
        "assignments_dropped",
        "sequences",
        "steps",
        "batch_fingerprint",
        "world_size",
    ):
        assert found[field] == expected[field], field
    # 32 steps of 16 sequences of 32 tokens.
    assert found["tokens"] == found["assignments"] == STEPS * 16 * 32
    assert 0 < found["assignments_dropped"] < found["assignments"]


@pytest.mark.parametrize("name", ["train/loss", "validation/loss", "final/loss", "train_step/drop_rate/layer_1"])
def test_curves_are_bit_for_bit_those_of_an_undisturbed_run(name: str, undisturbed: Path, resumed: Path) -> None:
    assert program.series(resumed, name) == program.series(undisturbed, name)
    assert program.series(resumed, name)


def test_recorded_plans_are_those_of_an_undisturbed_run(undisturbed: Path, resumed: Path) -> None:
    expected, found = (
        {str(path.relative_to(folder)): path for path in sorted((folder / "plans").rglob("*.npz"))}
        for folder in (undisturbed, resumed)
    )
    assert found.keys() == expected.keys()
    # 32 steps, two validations and a final pass, on two ranks.
    assert len(found) == 2 * (STEPS + 2 + 1)
    for name, path in found.items():
        with np.load(path) as one, np.load(expected[name]) as other:
            assert one.files == other.files, name
            assert all((one[column] == other[column]).all() for column in one.files), name
    index = program.read(resumed / "plans" / "recording.json")
    assert len(index["files"]) == len(found)


def test_ranks_that_torchrun_starts_anew_go_on_by_themselves(
    strategy: str, small_corpus: list[str], tmp_path: Path, undisturbed: Path
) -> None:
    options = (strategy, "strategy.max_restarts=1", "strategy.timeout_seconds=60", f"runs_dir={tmp_path}")
    process = program.start(*small_corpus, *ARGUMENTS, *options)
    directory = wait_for_step(tmp_path, 12, process)  # past the checkpoint of step 10
    os.kill(rank_processes(directory)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    status = program.read(directory / "status.json")
    assert (status["state"], status["restarts"]) == ("done", 1)
    for name in ("train/loss", "validation/loss", "final/loss"):
        assert program.series(directory, name) == program.series(undisturbed, name)
    totals = [program.read(path / "manifest.json") for path in (undisturbed, directory)]
    for field in ("tokens", "assignments", "assignments_dropped", "batch_fingerprint"):
        assert totals[0][field] == totals[1][field], field
    assert wait_until_gone(tmp_path) == []
