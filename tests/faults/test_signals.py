"""SIGTERM, SIGINT, SIGUSR1, SIGUSR2, to one rank, to the command or to everybody: at most a step is lost.

SIGTERM to the command is in test_interruption.py.
"""

import os
import signal
from contextlib import suppress
from pathlib import Path

import program
import psutil
import pytest
from test_interruption import LONG, STEPS, rank_processes, wait_for_step, wait_until_gone

FOUR = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
SHORT = {
    ("SIGINT", "rank", 1),
    ("SIGUSR1", "command", 1),
    ("SIGUSR1", "rank", 2),
    ("SIGUSR2", "everybody", "expert_parallel"),
    ("SIGINT", "command", 2),
}
# Experts on two ranks: the step ends with an exchange under way.
SHARED_EXPERTS = [("SIGTERM", "rank"), ("SIGUSR1", "command"), ("SIGUSR2", "everybody"), ("SIGINT", "everybody")]


def cases() -> list:
    every = [(name, to, ranks) for name in FOUR for to in ("rank", "command", "everybody") for ranks in (1, 2)]
    every += [(*case, "expert_parallel") for case in SHARED_EXPERTS]
    marks = {case: [] if case in SHORT else [pytest.mark.exhaustive] for case in every}
    return [pytest.param(*case, marks=mark, id="-".join(map(str, case))) for case, mark in marks.items()]


@pytest.mark.parametrize(("name", "to", "ranks"), cases())
def test_a_signal_saves_the_step_and_the_run_can_go_on(
    name: str, to: str, ranks: int | str, small_corpus: list[str], tmp_path: Path
) -> None:
    several = ()
    if ranks != 1:
        strategy, ranks = (ranks, 2) if isinstance(ranks, str) else ("ddp", ranks)
        several = (f"strategy={strategy}", "trainer.devices=2")
    # A sweep of one job trains in a process of its own, as any job without debug=... does.
    # Workers of the loader are among everybody, and are needed for one more step.
    loaded = "data.num_workers=1" if to == "everybody" else "data.num_workers=0"
    process = program.start("-m", *small_corpus, *LONG, *several, loaded, "seed=1", f"runs_dir={tmp_path}")
    directory = wait_for_step(tmp_path, 13, process)
    pids = {
        "rank": lambda: [rank_processes(directory, ranks)[ranks - 1]],
        "command": lambda: [process.pid],
        "everybody": lambda: [
            process.pid,
            *(each.pid for each in psutil.Process(process.pid).children(recursive=True)),
        ],
    }[to]()
    before = program.series(directory, "train/loss")[-1][0]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.Signals[name])
    _, errors = process.communicate(timeout=120)
    status = program.read(directory / "status.json")
    assert status["state"] == "preempted", errors
    # Ctrl-C at the command ends it as it ends any other.
    assert process.returncode == (130 if (name, to) in (("SIGINT", "command"), ("SIGINT", "everybody")) else 143)
    done = program.series(directory, "train/loss")[-1][0]
    assert status["step"] == done < STEPS
    assert before <= done
    assert (directory / "checkpoints" / f"step_{done}.ckpt").exists()
    assert f"step {done} is saved" in errors
    assert wait_until_gone(tmp_path) == []
    assert not (directory / "heartbeats").exists()


def test_ctrl_c_in_a_run_within_the_command_saves_too(small_corpus: list[str], tmp_path: Path) -> None:
    arguments = (*small_corpus, *LONG, f"runs_dir={tmp_path}")
    process = program.start(*arguments)
    directory = wait_for_step(tmp_path, 13, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    status = program.read(directory / "status.json")
    assert (status["state"], status["signal"], process.returncode) == ("preempted", "SIGINT", 130), errors
    assert (directory / "checkpoints" / f"step_{status['step']}.ckpt").exists()
