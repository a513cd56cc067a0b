"""A run directory belongs to one command, however many are started, and to nobody once that command was killed."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import forks
import program
import pytest

from lightning_base.program import claim
from lightning_base.program.claim import CLAIM, InUseError, claimed, read_owner

STEPS = 40
ARGUMENTS = ("router=uniform", f"trainer.max_steps={STEPS}", "trainer.progress_bar=false", "logger.tensorboard=false")


def test_of_two_commands_at_once_one_trains_and_the_other_says_who_does(
    small_corpus: list[str], tmp_path: Path
) -> None:
    arguments = (*small_corpus, *ARGUMENTS, f"hydra.run.dir={tmp_path}/run")
    both = [program.start(*arguments) for _ in range(2)]
    ended = {process.pid: (process.communicate(timeout=240)[1], process.returncode) for process in both}
    first, second = sorted(ended, key=lambda pid: ended[pid][1] or 0)
    assert [ended[pid][1] for pid in (first, second)] == [0, 2], ended
    assert f"run is in use by process {first} on {socket.gethostname()}: wait for it or end it" in ended[second][0]
    assert [step for step, _ in program.series(tmp_path / "run", "train/loss")] == list(range(1, STEPS + 1))
    assert program.read(tmp_path / "run" / "status.json")["state"] == "done"


def test_a_second_sweep_is_refused_before_its_first_job_and_writes_nothing(
    small_corpus: list[str], tmp_path: Path
) -> None:
    arguments = ("-m", *small_corpus, *ARGUMENTS, "router=uniform,switch", f"runs_dir={tmp_path}/runs")
    with claimed(tmp_path / "runs" / "debug" / "theirs"):
        done = program.train(*arguments, "hydra.sweep.subdir=theirs", "router=uniform")
        assert done.returncode == 2
        assert f"theirs is in use by process {os.getpid()} on {socket.gethostname()}" in done.stderr
    assert {path.name for path in (tmp_path / "runs" / "debug" / "theirs").iterdir()} == {CLAIM, ".ranks"}


def hold(folder: str) -> None:
    with claimed(Path(folder)):
        (Path(folder) / "held").touch()
        time.sleep(600)


def test_a_killed_owner_holds_nothing(tmp_path: Path) -> None:
    owner = forks.start_function(hold, str(tmp_path))
    deadline = time.monotonic() + 120
    while not (tmp_path / "held").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(InUseError, match=f"in use by process {owner.pid} on {socket.gethostname()}"), claimed(tmp_path):
        pass
    owner.send_signal(signal.SIGKILL)
    owner.communicate(timeout=60)
    with claimed(tmp_path):
        assert read_owner(tmp_path)["pid"] == os.getpid()
    assert read_owner(tmp_path) is None


@pytest.mark.parametrize("alive", [True, False])
def test_an_owner_on_another_host_counts_as_long_as_it_touches_its_claim(
    alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a file system whose locks do not reach other hosts: the lock is free, and the file says whose it is.
    monkeypatch.setattr(claim, "SILENT_SECONDS", 1.5)
    monkeypatch.setattr(claim, "HEARTBEAT_SECONDS", 0.2)
    path, ended, said = tmp_path / CLAIM, threading.Event(), []
    path.write_text(json.dumps({"host": "elsewhere", "pid": 17, "started": 1.0}))
    beat = threading.Thread(target=claim._beat, args=(path, ended))
    if alive:
        beat.start()
    try:
        if alive:
            with pytest.raises(InUseError, match="in use by process 17 on elsewhere"), claimed(tmp_path, said.append):
                pass
        else:
            with claimed(tmp_path, said.append):
                pass
    finally:
        ended.set()
    assert len(said) == 1
    assert "whether process 17 on elsewhere works in" in said[0]


def test_ranks_that_outlive_their_command_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "RANKS_SECONDS", 0.5)
    gone = pytest.raises(InUseError, match="by ranks of a command that was killed")
    with claim.as_rank(tmp_path), gone, claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass
