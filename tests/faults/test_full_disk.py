"""A disk that is full says so, names what is safe, and loses nothing: with room again, the same command goes on."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import program
import pytest

ARGUMENTS = (
    "router=uniform",
    "trainer.max_steps=6",
    "trainer.keep_checkpoints=null",
    "trainer.progress_bar=false",
    "logger.tensorboard=false",
)
TWO_RANKS = ("strategy=ddp", "trainer.devices=2", "strategy.timeout_seconds=60")
SHARED_EXPERTS = ("strategy=expert_parallel", *TWO_RANKS[1:])

LIMITING = '''
import resource

from lightning_base.routing.uniform import Uniform


class Limiting(Uniform):
    """Round-robin; after three steps no file may grow beyond some bytes."""

    steps = 0

    def end_step(self, sums):
        super().end_step(sums)
        self.steps += 1
        if self.steps == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))
'''


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for less than three checkpoints."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize(
    "ranks",
    [(), *(pytest.param(several, marks=pytest.mark.exhaustive) for several in (TWO_RANKS, SHARED_EXPERTS))],
    ids=["one", "two", "shared_experts"],
)
def test_a_full_disk_in_a_save_ends_the_run_with_what_is_safe_and_with_room_it_goes_on(
    ranks: tuple[str, ...], small_corpus: list[str], small_disk: Path
) -> None:
    run = small_disk / "run"
    arguments = (*small_corpus, *ARGUMENTS, *ranks, f"hydra.run.dir={run}")
    done = program.train(*arguments)
    assert done.returncode == 1, done.stderr
    status = program.read(run / "status.json")
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert status["state"] == "failed"
    assert "cannot be written" in status["error"]
    assert f"the disk is full: no room for {run}/checkpoints/.step_" in status["error"]
    assert f"{run}/checkpoints/{saved[-1]} is whole. Make room, and the same command goes on" in status["error"]
    assert saved[0] == "step_2.ckpt"
    assert len(saved) in (1, 2)

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = program.train(*arguments)
    assert again.returncode == 0, again.stderr
    assert program.read(run / "manifest.json")["resumes"][0]["checkpoint"] == str(run / "checkpoints" / saved[-1])
    assert [step for step, _ in program.series(run, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_no_room_for_the_metrics_is_said_too(small_corpus: list[str], tmp_path: Path) -> None:
    (tmp_path / "limiting.py").write_text(LIMITING)
    (tmp_path / "router").mkdir()
    yaml = "_target_: lightning_base.routing.limiting.Limiting\nnum_experts: 8\n"
    (tmp_path / "router" / "limiting.yaml").write_text(yaml)
    run = tmp_path / "run"
    arguments = (*small_corpus, *ARGUMENTS, "router=limiting", f"hydra.run.dir={run}")
    done = program.train(*arguments, routers=tmp_path)
    assert done.returncode == 1, done.stderr
    error = program.read(run / "status.json")["error"]
    assert error.startswith("DiskFullError: the limit for the size of a file is reached")
    assert f"{run}/checkpoints/step_2.ckpt is whole. Make room, and the same command goes on from there" in error
    assert error in done.stderr
