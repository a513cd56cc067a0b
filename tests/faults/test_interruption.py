"""Real signals to real runs: what is done stays done, and the same command goes on from there."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import program
import psutil
import pytest
import torch
from forks import Forked

from lightning_base.program.processes.heartbeat import read_beats

STEPS = 60
LONG = (f"trainer.max_steps={STEPS}", "trainer.checkpoint_every_n_steps=10", "trainer.validate_every_n_steps=20")


def start_anew(*arguments: str) -> subprocess.Popen:
    """The program as a user starts it, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *program.command(*arguments)],
        env=program.environment(),
        cwd=program.REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_step(folder: Path, step: int, process: Forked | subprocess.Popen, seconds: float = 120) -> Path:
    """The job's directory, once it has logged a step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for path in folder.glob("debug/*/metrics.csv"):
            if any(done >= step for done, _ in program.series(path.parent, "train/loss")):
                return path.parent
        assert process.poll() is None, process.communicate(timeout=10)
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in {seconds} s")


def rank_processes(directory: Path, ranks: int = 2) -> dict[int, int]:
    """The process of every rank of a running job, as its heartbeat says."""
    found = {rank: beat.pid for rank, beat in read_beats(directory / "heartbeats" / "node_0").items()}
    assert sorted(found) == list(range(ranks))
    return found


def wait_until_gone(folder: Path, seconds: float = 60) -> list[str]:
    """The processes that still work on a folder when the time is up; none, one hopes."""
    deadline = time.monotonic() + seconds
    while (left := program.processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.fixture(scope="module")
def undisturbed(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = program.train(*small_corpus, *LONG, f"runs_dir={folder}")
    assert done.returncode == 0, done.stderr
    return program.only_job(folder)


def final_weights(directory: Path) -> dict[str, torch.Tensor]:
    return program.state(directory / "checkpoints" / f"step_{STEPS}.ckpt")["state_dict"]


def assert_same_run(directory: Path, undisturbed: Path) -> None:
    """Bit for bit: weights, losses, batches."""
    expected, found = final_weights(undisturbed), final_weights(directory)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert program.series(directory, "train/loss") == program.series(undisturbed, "train/loss")
    assert program.series(directory, "validation/loss") == program.series(undisturbed, "validation/loss")
    manifests = [program.read(path / "manifest.json") for path in (directory, undisturbed)]
    for field in ("batch_fingerprint", "sequences", "tokens", "assignments", "initial_weights_fingerprint", "result"):
        assert manifests[0][field] == manifests[1][field], field


def test_sigterm_saves_and_the_same_command_continues_bit_for_bit(
    small_corpus: list[str], tmp_path: Path, undisturbed: Path
) -> None:
    arguments = (*small_corpus, *LONG, f"runs_dir={tmp_path}")
    process = program.start(*arguments)
    directory = wait_for_step(tmp_path, 13, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert program.read(directory / "status.json")["state"] == "preempted"
    assert len(program.series(directory, "train/loss")) < STEPS

    again = program.train(*arguments)
    assert again.returncode == 0, again.stderr
    assert program.read(directory / "status.json")["state"] == "done"
    assert_same_run(directory, undisturbed)


def test_sigterm_to_a_job_of_two_ranks_stops_both_at_the_same_step(small_corpus: list[str], tmp_path: Path) -> None:
    ranks = ("strategy=expert_parallel", "trainer.devices=2")
    process = program.start(*small_corpus, *LONG, *ranks, f"runs_dir={tmp_path}")
    directory = wait_for_step(tmp_path, 13, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert program.read(directory / "status.json")["state"] == "preempted", errors
    assert process.returncode == 128 + signal.SIGTERM
    assert wait_until_gone(tmp_path) == []
    steps = [int(path.stem.split("_")[1]) for path in (directory / "checkpoints").glob("*.ckpt")]
    assert max(steps) >= 13


def test_killing_the_launcher_leaves_no_rank_behind_and_the_run_resumes(
    small_corpus: list[str], tmp_path: Path, undisturbed: Path
) -> None:
    arguments = ("-m", *small_corpus, *LONG, f"runs_dir={tmp_path}")
    process = start_anew(*arguments)
    directory = wait_for_step(tmp_path, 23, process)
    tree = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert psutil.wait_procs(tree, timeout=60)[1] == []
    assert wait_until_gone(tmp_path) == []
    assert len(program.series(directory, "train/loss")) < STEPS, "a rank went on without anybody to tell how it ended"

    again = program.train(*arguments)
    assert again.returncode == 0, again.stderr
    assert_same_run(directory, undisturbed)


@pytest.mark.parametrize(
    ("start", "strategy"),
    [(program.start, "expert_parallel"), pytest.param(start_anew, "ddp", marks=pytest.mark.exhaustive)],
)
def test_a_killed_rank_ends_the_job_with_a_status(
    start: Callable[..., Forked | subprocess.Popen], strategy: str, small_corpus: list[str], tmp_path: Path
) -> None:
    ranks = (f"strategy={strategy}", "trainer.devices=2", "strategy.timeout_seconds=20")
    process = start(*small_corpus, *LONG, *ranks, f"runs_dir={tmp_path}")
    directory = wait_for_step(tmp_path, 13, process)
    # The launcher's child is torchrun, and its children are the ranks.
    (torchrun,) = (child for child in psutil.Process(process.pid).children() if len(child.children()) == 2)
    killed = max(torchrun.children(), key=lambda rank: rank.pid)
    (rank,) = (rank for rank, pid in rank_processes(directory).items() if pid == killed.pid)
    killed.kill()
    process.communicate(timeout=120)
    assert process.returncode == 1
    status = program.read(directory / "status.json")
    assert (status["state"], status["rank"]) == ("failed", rank)
    assert f"rank {rank} was killed by SIGKILL after step" in status["error"]
    assert wait_until_gone(tmp_path) == []


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    small_corpus: list[str], tmp_path: Path, undisturbed: Path
) -> None:
    arguments = (*small_corpus, *LONG, f"runs_dir={tmp_path}")
    process = program.start(*arguments)
    directory = wait_for_step(tmp_path, 33, process)
    process.kill()
    process.communicate(timeout=30)
    newest = max((directory / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.split("_")[1])) / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])

    again = program.train(*arguments)
    assert again.returncode == 0, again.stderr
    assert_same_run(directory, undisturbed)
