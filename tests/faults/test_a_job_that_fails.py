"""A sweep of two-rank jobs in which one fails, on one rank only: the others finish, and nothing is left running.

The failing arm is a router of a user's own, one file and one YAML in a copy of the project.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import program
import pytest

ROUTER = '''
import os

from lightning_base.routing.uniform import Uniform


class Failing(Uniform):
    """Round-robin, until rank 1 has seen three batches."""

    def forward(self, tokens, token_ids, groups):
        self.seen = getattr(self, "seen", 0) + self.training
        if os.environ.get("RANK") == "1" and self.seen == 3:
            raise RuntimeError("the user's router broke on rank 1")
        return super().forward(tokens, token_ids, groups)
'''


@pytest.fixture(scope="module")
def sweep(
    small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess, Path]:
    """The finished sweep and its runs directory."""
    project = tmp_path_factory.mktemp("project")
    for name in ("lightning_base", "conf", "experiments"):
        shutil.copytree(program.REPOSITORY / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "lightning_base" / "routing" / "failing.py").write_text(ROUTER)
    yaml = "_target_: lightning_base.routing.failing.Failing\nnum_experts: 8\n"
    (project / "conf" / "router" / "failing.yaml").write_text(yaml)
    done = subprocess.run(
        [
            sys.executable,
            str(project / "experiments" / "train.py"),
            "-m",
            *small_corpus,
            "router=switch,failing,uniform",
            "strategy=ddp",
            "trainer.devices=2",
            "strategy.timeout_seconds=20",
            f"runs_dir={project}/runs",
        ],
        cwd=project,
        env={**program.environment(), "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done, project / "runs"


def test_the_others_finish_and_the_command_ends_non_zero(sweep: tuple[subprocess.CompletedProcess, Path]) -> None:
    done, runs = sweep
    states = {name: program.read(path / "status.json")["state"] for name, path in program.jobs(runs).items()}
    assert done.returncode == 1
    assert [states[name] for name in sorted(states)] == ["failed", "done", "done"], done.stderr
    assert "2 of 3 jobs done" in done.stderr


def test_the_status_holds_the_traceback_of_the_rank_that_failed_first(
    sweep: tuple[subprocess.CompletedProcess, Path],
) -> None:
    _, runs = sweep
    (failed,) = (path for name, path in program.jobs(runs).items() if "failing" in name)
    status = program.read(failed / "status.json")
    assert status["rank"] == 1
    assert status["error"] == "RuntimeError: the user's router broke on rank 1"
    assert "failing.py" in status["traceback"]


def test_what_was_computed_before_the_failure_is_still_there(sweep: tuple[subprocess.CompletedProcess, Path]) -> None:
    _, runs = sweep
    (failed,) = (path for name, path in program.jobs(runs).items() if "failing" in name)
    assert [step for step, _ in program.series(failed, "train/loss")] == [1, 2]
    assert (failed / "checkpoints" / "step_2.ckpt").exists()


def test_nothing_is_left_running(sweep: tuple[subprocess.CompletedProcess, Path]) -> None:
    _, runs = sweep
    assert program.processes_of(runs) == []
