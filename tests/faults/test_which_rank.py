"""One of two ranks hangs, raises or computes NaN: the job ends soon, and its status names that rank."""

import os
import signal
import time
from pathlib import Path

import program
import psutil
import pytest
from omegaconf import OmegaConf
from test_interruption import LONG, rank_processes, wait_for_step, wait_until_gone

TIMEOUT = 10
RANKS = ("strategy=ddp", "trainer.devices=2", f"strategy.timeout_seconds={TIMEOUT}")
# What a shared machine may add to a few seconds.
SLACK = 30
ROUTER = '''
import os
import time

import torch

from lightning_base.program.checkpoint import together
from lightning_base.metrics.expert_load import ExpertLoad
from lightning_base.routing.uniform import Uniform


class BreaksInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens):
        return tokens.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("broken in the backward pass")


class Breaking(Uniform):
    """Round-robin, until one rank has seen three batches."""

    def __init__(self, num_experts, width, place="forward"):
        super().__init__(num_experts=num_experts, width=width)
        self.place, self.seen = place, 0

    def forward(self, tokens, token_ids, groups):
        learns = self.training and torch.is_grad_enabled() and not self.rehearsal
        self.seen += learns
        plan = super().forward(tokens, token_ids, groups)
        # The first rank writes checkpoints, so that it alone can fail in that.
        if os.environ.get("RANK") != ("0" if self.place == "save" else "1") or self.seen != 3 or not learns:
            return plan
        if self.place == "hang":
            time.sleep(10_000)
        elif self.place == "loss":
            plan = type(plan)(**{**vars(plan), "weight": plan.weight * float("nan")})
        elif self.place == "backward":
            plan = type(plan)(**{**vars(plan), "weight": BreaksInBackward.apply(plan.weight + tokens.sum() * 0)})
        elif self.place == "metric":
            def update(*args, **kwargs):
                raise RuntimeError("broken in a metric")
            ExpertLoad.update = update
        elif self.place == "save":
            def write_part(*args, **kwargs):
                raise OSError("broken in a save")
            together.write_part = write_part
        elif self.place == "forward":
            raise RuntimeError("broken in the forward pass")
        return plan
'''


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routers")
    (folder / "breaking.py").write_text(ROUTER)
    (folder / "router").mkdir()
    yaml = "_target_: lightning_base.routing.breaking.Breaking\nnum_experts: 8\nplace: forward\n"
    (folder / "router" / "breaking.yaml").write_text(yaml)
    return folder


def test_a_rank_that_hangs_is_named_with_its_stack(small_corpus: list[str], routers: Path, tmp_path: Path) -> None:
    began = time.time()
    done = program.train(
        "-m", *small_corpus, *RANKS, "router=breaking", "router.place=hang", f"runs_dir={tmp_path}", routers=routers
    )
    status = program.read(program.only_job(tmp_path) / "status.json")
    assert (done.returncode, status["state"], status["rank"]) == (1, "failed", 1), done.stderr
    assert "rank 1 does not answer after step 2, in the forward pass" in status["error"]
    assert "breaking.py" in status["traceback"]
    assert wait_until_gone(tmp_path) == []
    assert status["updated"] - began < TIMEOUT + 2 * SLACK


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_stopped_rank_is_named(stopped: int, small_corpus: list[str], tmp_path: Path) -> None:
    process = program.start(*small_corpus, *LONG, *RANKS, f"runs_dir={tmp_path}")
    directory = wait_for_step(tmp_path, 13, process)
    os.kill(rank_processes(directory)[stopped], signal.SIGSTOP)
    began = time.time()
    _, errors = process.communicate(timeout=TIMEOUT + 120)
    status = program.read(directory / "status.json")
    assert (process.returncode, status["state"], status["rank"]) == (1, "failed", stopped), errors
    assert f"rank {stopped} is stopped (SIGSTOP) after step" in status["error"]
    assert status["traceback"] is not None, "what the other rank said of it"
    assert wait_until_gone(tmp_path) == []
    assert status["updated"] - began < TIMEOUT + SLACK


@pytest.mark.exhaustive
def test_the_only_rank_is_named_when_it_is_stopped(small_corpus: list[str], tmp_path: Path) -> None:
    options = ("-m", "seed=1", "strategy=ddp", "strategy.timeout_seconds=5")
    process = program.start(*options, *small_corpus, *LONG, f"runs_dir={tmp_path}")
    directory = wait_for_step(tmp_path, 13, process)
    os.kill(rank_processes(directory, 1)[0], signal.SIGSTOP)
    process.communicate(timeout=120)
    status = program.read(directory / "status.json")
    assert (process.returncode, status["state"], status["rank"]) == (1, "failed", 0)
    assert "rank 0 is stopped (SIGSTOP)" in status["error"]


BROKEN = {
    "backward": "RuntimeError: broken in the backward pass",
    "metric": "RuntimeError: broken in a metric",
    "save": "cannot be written on rank 0: OSError: broken in a save",
    "loss": "NonFiniteError: The loss is not finite at step 3",
}


@pytest.fixture(scope="module")
def broken(small_corpus: list[str], routers: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The jobs of a sweep, by where one of their ranks raises; a forward pass is in test_a_job_that_fails.py."""
    runs = tmp_path_factory.mktemp("broken")
    arms = ("router=breaking", f"router.place={','.join(BROKEN)}")
    done = program.train("-m", *small_corpus, *RANKS, *arms, f"runs_dir={runs}", routers=routers, timeout=400)
    assert done.returncode == 1, done.stderr
    assert "0 of 4 jobs done" in done.stderr
    assert wait_until_gone(runs) == []
    return {OmegaConf.load(path / ".hydra/config.yaml").router.place: path for path in program.jobs(runs).values()}


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", BROKEN)
def test_the_rank_that_raises_is_named_with_its_traceback(place: str, broken: dict[str, Path]) -> None:
    status = program.read(broken[place] / "status.json")
    assert (status["state"], status["rank"]) == ("failed", 0 if place == "save" else 1)
    assert BROKEN[place] in status["error"]
    assert place == "save" or status["error"].startswith(BROKEN[place])
    assert "breaking.py" in status["traceback"] or place == "loss"
    failures = [program.read(path)["time"] for path in (broken[place] / "failures").glob("rank_*.json")]
    assert status["updated"] - min(failures) < SLACK


@pytest.mark.exhaustive
def test_killing_torchrun_leaves_no_rank_behind_and_says_so(small_corpus: list[str], tmp_path: Path) -> None:
    process = program.start("-m", "seed=1", *small_corpus, *LONG, *RANKS, f"runs_dir={tmp_path}")
    directory = wait_for_step(tmp_path, 13, process)
    psutil.Process(rank_processes(directory)[0]).parent().kill()
    _, errors = process.communicate(timeout=120)
    assert wait_until_gone(tmp_path) == []
    # Ranks save when whoever started them dies; if a collective kept one of them from it, the job has failed.
    status = program.read(directory / "status.json")
    assert status["state"] in ("preempted", "failed"), errors
    assert status["state"] == "preempted" or "SIGKILL" in status["error"]
