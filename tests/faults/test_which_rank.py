"""One of two ranks hangs, raises or computes NaN: the job ends soon, and its status names that rank."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import program
import psutil
import pytest
from omegaconf import OmegaConf
from test_interruption import LONG, STEPS, rank_processes, wait_for_step, wait_until_gone

TIMEOUT = 10
RANKS = ("trainer.devices=2", f"strategy.timeout_seconds={TIMEOUT}")
# With experts on both ranks there is an exchange to hang in, beside the gradients'; the long form has replicas too.
STRATEGIES = ["expert_parallel", pytest.param("ddp", marks=pytest.mark.exhaustive)]
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
        self.factor = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def reset_parameters(self):
        torch.nn.init.ones_(self.factor)

    def forward(self, tokens, token_ids, groups):
        learns = self.training and torch.is_grad_enabled() and not self.rehearsal
        self.seen += learns
        plan = super().forward(tokens, token_ids, groups)
        if self.place == "weights":
            plan = type(plan)(**{**vars(plan), "weight": plan.weight * self.factor.clone()})
        # The first rank writes checkpoints, so that it alone can fail in that; a process alone has no number.
        if os.environ.get("RANK") not in (None, "0" if self.place == "save" else "1") or self.seen != 3 or not learns:
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
        elif self.place == "weights":
            self.factor.fill_(float("nan"))  # the next step is the first that has it in its loss
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


@dataclass
class Ended:
    """A command that has ended: its exit code, what it printed, its job and how many seconds its end took."""

    code: int | None
    errors: str
    run: Path
    seconds: float

    @property
    def status(self) -> dict[str, Any]:
        return program.read(self.run / "status.json")


@pytest.fixture(scope="module", params=STRATEGIES)
def ended(
    request: pytest.FixtureRequest, small_corpus: list[str], routers: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Ended]:
    """Two jobs at a time, which wait for most of theirs: in one rank 1 hangs, in the other one is stopped."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("hanging", "stopped")}
    common = (*small_corpus, *RANKS, f"strategy={request.param}")
    hang = ("router=breaking", "router.place=hang", f"runs_dir={folders['hanging']}")
    began = {"hanging": time.time()}
    commands = {
        "hanging": program.start("-m", *common, *hang, routers=routers),
        "stopped": program.start(*common, *LONG, f"runs_dir={folders['stopped']}"),
    }
    run = wait_for_step(folders["stopped"], 13, commands["stopped"])
    os.kill(rank_processes(run)[stopped_rank(request.param)], signal.SIGSTOP)
    began["stopped"] = time.time()
    found = {}
    for name, command in commands.items():
        _, errors = command.communicate(timeout=TIMEOUT + 200)
        path = program.only_job(folders[name])
        seconds = program.read(path / "status.json")["updated"] - began[name]
        found[name] = Ended(command.returncode, errors, path, seconds)
        assert wait_until_gone(folders[name]) == []
    return found


def stopped_rank(strategy: str) -> int:
    return 0 if strategy == "expert_parallel" else 1


def test_a_rank_that_hangs_is_named_with_its_stack(ended: dict[str, Ended]) -> None:
    job = ended["hanging"]
    assert (job.code, job.status["state"], job.status["rank"]) == (1, "failed", 1), job.errors
    assert "rank 1 does not answer after step 2, in the forward pass" in job.status["error"]
    assert "breaking.py" in job.status["traceback"]
    assert job.seconds < TIMEOUT + 2 * SLACK


def test_a_stopped_rank_is_named(ended: dict[str, Ended]) -> None:
    job = ended["stopped"]
    stopped = stopped_rank(OmegaConf.load(job.run / ".hydra" / "config.yaml").strategy.name)
    assert (job.code, job.status["state"], job.status["rank"]) == (1, "failed", stopped), job.errors
    assert f"rank {stopped} is stopped (SIGSTOP) after step" in job.status["error"]
    assert job.seconds < TIMEOUT + SLACK


@pytest.mark.exhaustive
def test_the_only_rank_is_named_when_it_is_stopped(small_corpus: list[str], tmp_path: Path) -> None:
    options = ("-m", "seed=1", "strategy.timeout_seconds=5")
    process = program.start(*options, *small_corpus, *LONG, f"runs_dir={tmp_path}")
    directory = wait_for_step(tmp_path, 13, process)
    os.kill(rank_processes(directory, 1)[0], signal.SIGSTOP)
    process.communicate(timeout=120)
    status = program.read(directory / "status.json")
    assert (process.returncode, status["state"], status["rank"]) == (1, "failed", 0)
    assert "rank 0 is stopped (SIGSTOP)" in status["error"]


BROKEN = {
    "forward": "RuntimeError: broken in the forward pass",
    "backward": "RuntimeError: broken in the backward pass",
    "metric": "RuntimeError: broken in a metric",
    "save": "cannot be written on rank 0: OSError: broken in a save",
    "loss": "NonFiniteError: The loss is not finite at step 3",
}


@pytest.fixture(scope="module")
def broken(
    small_corpus: list[str], routers: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """The jobs of a sweep, by their strategy and where one of their ranks raises."""
    runs = tmp_path_factory.mktemp("broken")
    everywhere = ("-m", "router=breaking", f"router.place={','.join(BROKEN)}", *small_corpus, f"runs_dir={runs}")
    for strategies, ranks in (("single", ()), ("ddp,expert_parallel", RANKS)):
        done = program.train(*everywhere, f"strategy={strategies}", *ranks, routers=routers, timeout=500)
        assert done.returncode == 1, done.stderr
        assert f"0 of {(1 + strategies.count(',')) * len(BROKEN)} jobs done" in done.stderr
        assert wait_until_gone(runs) == []
    configs = {path: OmegaConf.load(path / ".hydra/config.yaml") for path in program.jobs(runs).values()}
    return {(config.strategy.name, config.router.place): path for path, config in configs.items()}


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["single", "ddp", "expert_parallel"])
@pytest.mark.parametrize("place", BROKEN)
def test_the_rank_that_raises_is_named_with_its_traceback(
    place: str, strategy: str, broken: dict[tuple[str, str], Path]
) -> None:
    run = broken[strategy, place]
    status = program.read(run / "status.json")
    assert (status["state"], status["rank"]) == ("failed", 0 if place == "save" or strategy == "single" else 1)
    assert BROKEN[place].replace(" on rank 0" if strategy == "single" else "", "") in status["error"]
    assert place == "save" or status["error"].startswith(BROKEN[place])
    assert "breaking.py" in status["traceback"] or place == "loss"
    failures = [program.read(path)["time"] for path in (run / "failures").glob("rank_*.json")]
    assert status["updated"] - min(failures) < SLACK


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["single", "ddp", "expert_parallel"])
def test_weights_that_are_not_finite_on_one_rank_are_saved_by_none(
    strategy: str, small_corpus: list[str], routers: Path, tmp_path: Path
) -> None:
    """The ranks agree about it, and none waits for another in a save."""
    ranks = RANKS if strategy != "single" else ()
    options = ("-m", *ranks, f"strategy={strategy}", "router=breaking", "router.place=weights")
    every_step = ("trainer.checkpoint_every_n_steps=1", "trainer.max_steps=6", "trainer.detect_anomaly=false")
    done = program.train(*small_corpus, *options, *every_step, f"runs_dir={tmp_path}", routers=routers)
    assert done.returncode == 1, done.stderr
    run = program.only_job(tmp_path)
    saved = {path.name for path in (run / "checkpoints").glob("step_*")}
    assert "step_2.ckpt" in saved
    assert "step_3.ckpt" not in saved
    assert "step_4.ckpt" not in saved
    assert "step_2.ckpt" in program.read(run / "status.json")["error"]
    assert wait_until_gone(tmp_path) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("killed", ["torchrun", "the command"])
def test_killing_what_started_the_ranks_leaves_none_behind_and_the_run_goes_on(
    killed: str, small_corpus: list[str], tmp_path: Path
) -> None:
    arguments = ("-m", "strategy=expert_parallel", *small_corpus, *LONG, *RANKS, f"runs_dir={tmp_path}")
    process = program.start(*arguments)
    directory = wait_for_step(tmp_path, 13, process)
    parent = psutil.Process(rank_processes(directory)[0]).parent()
    assert parent is not None
    (parent if killed == "torchrun" else process).kill()
    _, errors = process.communicate(timeout=120)
    assert wait_until_gone(tmp_path) == []
    # Ranks save when whoever started them dies; if a collective kept one of them from it, the job has failed. Without
    # the command there is nobody to say so.
    status = program.read(directory / "status.json")
    assert status["state"] in ("preempted", "failed" if killed == "torchrun" else "running"), errors
    assert status["state"] != "failed" or "SIGKILL" in status["error"]

    again = program.train(*arguments)
    assert again.returncode == 0, again.stderr
    assert [step for step, _ in program.series(directory, "train/loss")] == list(range(1, STEPS + 1))
