"""A sweep of two-rank jobs in which one fails, on one rank only: the others finish, and nothing is left running.

The failing arm is a router of a user's own, one file and one YAML.
"""

import subprocess
from pathlib import Path

import program
import pytest
from test_interruption import wait_until_gone

ROUTER = '''
import os

from lightning_base.routing.uniform import Uniform


class Failing(Uniform):
    """Round-robin, until rank 1 has seen three batches."""

    def forward(self, tokens, token_ids, groups):
        self.seen = getattr(self, "seen", 0) + (self.training and not self.rehearsal)
        if os.environ.get("RANK") == "1" and self.seen == 3:
            raise RuntimeError("the user's router broke on rank 1")
        return super().forward(tokens, token_ids, groups)
'''


@pytest.fixture(scope="module")
def sweep(
    small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess, Path]:
    """The finished sweep and its runs directory."""
    folder = tmp_path_factory.mktemp("routers")
    (folder / "failing.py").write_text(ROUTER)
    (folder / "router").mkdir()
    yaml = "_target_: lightning_base.routing.failing.Failing\nnum_experts: 8\n"
    (folder / "router" / "failing.yaml").write_text(yaml)
    arms = ("-m", *small_corpus, "router=failing,uniform")
    ranks = ("strategy=ddp", "trainer.devices=2", "strategy.timeout_seconds=20")
    done = program.train(*arms, *ranks, f"runs_dir={folder}/runs", routers=folder)
    return done, folder / "runs"


def test_the_others_finish_and_the_command_ends_non_zero(sweep: tuple[subprocess.CompletedProcess, Path]) -> None:
    done, runs = sweep
    states = {name: program.read(path / "status.json")["state"] for name, path in program.jobs(runs).items()}
    assert done.returncode == 1
    assert [states[name] for name in sorted(states)] == ["failed", "done"], done.stderr
    assert "1 of 2 jobs done" in done.stderr


def test_the_status_holds_the_traceback_of_the_rank_that_failed_first(
    sweep: tuple[subprocess.CompletedProcess, Path],
) -> None:
    _, runs = sweep
    (failed,) = (path for name, path in program.jobs(runs).items() if "failing" in name)
    status = program.read(failed / "status.json")
    assert status["rank"] == 1
    where = "(in Failing.forward, line 13 of failing.py)"
    assert status["error"] == f"RuntimeError: the user's router broke on rank 1 {where}"
    assert "failing.py" in status["traceback"]


def test_what_was_computed_before_the_failure_is_still_there(sweep: tuple[subprocess.CompletedProcess, Path]) -> None:
    _, runs = sweep
    (failed,) = (path for name, path in program.jobs(runs).items() if "failing" in name)
    assert [step for step, _ in program.series(failed, "train/loss")] == [1, 2]
    assert (failed / "checkpoints" / "step_2.ckpt").exists()


def test_nothing_is_left_running(sweep: tuple[subprocess.CompletedProcess, Path]) -> None:
    _, runs = sweep
    assert wait_until_gone(runs) == []
