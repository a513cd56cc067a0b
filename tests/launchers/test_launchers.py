"""Each launcher really launches two jobs of two ranks; a pre-empted job is queued again; Optuna goes by the loss."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import program
import pytest
from omegaconf import OmegaConf


def start_anew(*arguments: str) -> subprocess.Popen:
    """The program as a terminal starts it, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *program.command(*arguments)],
        env=program.environment(),
        cwd=program.REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


TWO_RANKS = ("strategy=ddp", "trainer.devices=2", "seed=1,2")


@pytest.mark.exhaustive
@pytest.mark.parametrize("launcher", ["parallel", "like_slurm"])
def test_two_jobs_of_two_ranks(launcher: str, small_corpus: list[str], tmp_path: Path) -> None:
    chosen = (f"hydra/launcher={launcher}", f"runs_dir={tmp_path}")
    done = program.train_anew("-m", *small_corpus, *TWO_RANKS, *chosen)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 jobs done" in done.stderr
    jobs = program.jobs(tmp_path)
    states = [program.read(path / "status.json") for name, path in jobs.items() if not name.startswith(".")]
    assert [status["state"] for status in states] == ["done", "done"]
    # Side by side, and not one after the other.
    assert max(status["started"] for status in states) < min(status["updated"] for status in states)


@pytest.mark.exhaustive
def test_a_job_that_submitit_pre_empts_saves_and_is_queued_again(small_corpus: list[str], tmp_path: Path) -> None:
    steps = ("trainer.max_steps=100", "trainer.validate_every_n_steps=50", "trainer.checkpoint_every_n_steps=1000")
    chosen = ("hydra/launcher=like_slurm", "strategy=ddp", "trainer.devices=2", "seed=1", f"runs_dir={tmp_path}")
    process = start_anew("-m", *small_corpus, *steps, *chosen)
    deadline = time.monotonic() + 200
    while not any(len(program.series(path.parent, "train/loss")) >= 13 for path in tmp_path.glob("*/*/metrics.csv")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (directory,) = (path for name, path in program.jobs(tmp_path).items() if not name.startswith("."))
    before = program.read(directory / "status.json")
    os.kill(before["pid"], signal.SIGUSR2)
    process.communicate(timeout=240)
    assert process.returncode == 0
    after = program.read(directory / "status.json")
    assert after["state"] == "done"
    assert after["pid"] != before["pid"]
    (log,) = tmp_path.glob("*/.submitit/*/*_0_log.err")
    said = log.read_text()
    assert "by SIGUSR2: step " in said
    # No checkpoint was due: what the second attempt went on from is the one it saved.
    assert [step for step, _ in program.series(directory, "train/loss")] == list(range(1, 101))


@pytest.mark.exhaustive
@pytest.mark.parametrize("to", ["command", "everybody"])
def test_jobs_side_by_side_save_when_the_command_is_asked_to_stop(
    to: str, small_corpus: list[str], tmp_path: Path
) -> None:
    long = ("trainer.max_steps=400", "trainer.validate_every_n_steps=200", "trainer.checkpoint_every_n_steps=1000")
    process = start_anew("-m", *small_corpus, *long, "hydra/launcher=parallel", "seed=1,2,3", f"runs_dir={tmp_path}")
    deadline = time.monotonic() + 200
    while sum(len(program.series(p.parent, "train/loss")) >= 13 for p in tmp_path.glob("*/*/metrics.csv")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (os.killpg if to == "everybody" else os.kill)(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    states = [program.read(path) for path in tmp_path.glob("*/*/status.json")]
    assert [status["state"] for status in states] == ["preempted", "preempted"]
    for path in tmp_path.glob("*/*/status.json"):
        assert (path.parent / "checkpoints" / f"step_{program.read(path)['step']}.ckpt").exists()


def test_optuna_goes_by_the_validation_loss_and_the_same_command_goes_on(
    small_corpus: list[str], tmp_path: Path
) -> None:
    vary = ("module.learning_rate=interval(0.001,0.01)", "model.heads=choice(1,2)")
    search = ("-m", *small_corpus, "hydra/sweeper=search", "hydra.sweeper.n_trials=2", *vary)
    done = program.train(*search, f"runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    losses = {
        program.read(path / "manifest.json")["result"]["final/loss"]: OmegaConf.load(path / ".hydra/config.yaml")
        for path in program.jobs(tmp_path).values()
    }
    assert len(losses) == 2
    best = OmegaConf.load(tmp_path / "debug" / "optimization_results.yaml")
    assert best.best_value == min(losses)
    assert best.best_params["module.learning_rate"] == losses[min(losses)].module.learning_rate

    again = program.train(*search, f"runs_dir={tmp_path}")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("it is done") == 2, "the same choices"
    assert OmegaConf.load(tmp_path / "debug" / "optimization_results.yaml") == best


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["hydra/sweeper=search", "module.lerning_rate=interval(0.1,1)"], "module.lerning_rate is not a key"),
        (["hydra/sweeper=search", "data.vocab_size=choice(99,512)"], "data.vocab_size=99 cannot hold the 256 bytes"),
        (["module.learning_rate=interval(0.1,1)"], "interval(...) needs a sweeper that chooses"),
        (
            ["hydra/launcher=parallel", "hydra.launcher._target_=hydra_plugins.hydra_ray_launcher.RayLauncher"],
            "hydra/launcher=parallel needs the package hydra-ray-launcher, which is not installed",
        ),
    ],
)
def test_a_mistake_is_found_before_the_first_job(
    overrides: list[str], sentence: str, small_corpus: list[str], tmp_path: Path
) -> None:
    done = program.train("-m", *small_corpus, *overrides, f"runs_dir={tmp_path}")
    assert (done.returncode, list(tmp_path.glob("*/*/status.json"))) == (2, [])
    assert sentence in done.stderr
