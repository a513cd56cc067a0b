"""What a run starts from: its newest checkpoint that can be loaded, one that was given, or nothing."""

import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_base.distributed.meeting import Meeting
from lightning_base.instantiation import ConfigError
from lightning_base.program.checkpoint import CheckpointError, checkpoints, load, sweep_temporaries, verify
from lightning_base.program.claim import CLAIM, RANKS
from lightning_base.program.run_directory import RunDirectory

AUTO, NEVER = "auto", "never"


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that could not be used, and why."""

    checkpoint: str
    reason: str


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: what to load; None begins anew.
        step: the optimizer steps done there.
        logs: how long the files of the run's log were when it was saved; what they have gained since is cut.
        passed_over: newer checkpoints that could not be used.
    """

    checkpoint: Path | None = None
    step: int | None = None
    logs: dict[str, int] | None = None
    passed_over: tuple[PassedOver, ...] = ()


def find_start(run: RunDirectory, resume: str, shapes: Mapping[str, torch.Size], timeout_seconds: int) -> Start:
    """The newest checkpoint that fits, or the given one where the run has none of its own; the same on every rank.

    Every rank has to call it, and a checkpoint that one of them cannot use is passed over by all.

    Args:
        run: whose checkpoints.
        resume: ``auto``, ``never`` (the command has removed them: what there is has been saved since) or a path.
        shapes: of the state dict that has to take the weights.
        timeout_seconds: how long ranks wait for each other.

    Raises:
        ConfigError: there are checkpoints, and none can be used.
    """
    ranks = Meeting(timeout_seconds)
    own = [
        Path(path) for path in ranks.hear(str(run.checkpoints), [str(path) for path in checkpoints(run.checkpoints)])[0]
    ]
    given = [] if own or resume in (AUTO, NEVER) else [Path(resume)]
    passed: list[PassedOver] = []
    for path in own + given:
        state, reason = look(path, shapes)
        reasons = ranks.hear(str(path), reason)
        if not any(reasons):
            return Start(path, state["global_step"], {} if path in given else state["logs"], tuple(passed))
        rank = next(rank for rank, why in enumerate(reasons) if why)
        passed.append(PassedOver(str(path), reasons[rank] + ("" if all(reasons) else f", on rank {rank}")))
    if passed:
        raise ConfigError(no_checkpoint_left(run, passed))
    return Start()


def look(path: Path, shapes: Mapping[str, torch.Size]) -> tuple[dict[str, Any], str]:
    """A checkpoint without its numbers; or one sentence that says why it cannot be gone on from."""
    problem = verify(path)
    if problem:
        return {}, problem
    try:
        state = load(path, device="meta")
        check_fits(path, state, shapes)
    except CheckpointError as error:
        return {}, str(error)
    return state, ""


def check_fits(path: Path, state: dict[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    """Whether a checkpoint whose bytes are right can be gone on from.

    Raises:
        CheckpointError: it lacks something, or is one of another model.
    """
    needed = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "loops", "global_step", "logs")
    lacking = [name for name in needed if not isinstance(state, dict) or name not in state]
    if lacking:
        raise CheckpointError(f"the checkpoint {path} does not hold {', '.join(lacking)}: nothing can go on from it")
    found = {name: value.shape for name, value in state["state_dict"].items()}
    odd = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if odd:
        raise CheckpointError(f"the checkpoint {path} is one of another model: {odd[0]} does not fit")


def begin(run: RunDirectory, start: Start) -> None:
    """On the first rank: sweeps what a killed save has left, cuts the logs, and keeps where the run begins."""
    sweep_temporaries(run.checkpoints)
    run.cut_logs(start.logs or {})
    run.reserve_room()
    for passed in start.passed_over:
        print(f"passing over a checkpoint: {passed.reason}", file=sys.stderr, flush=True)
    if start.checkpoint is None:
        return
    if start.passed_over:
        print(f"going on from {start.checkpoint}", file=sys.stderr, flush=True)
    manifest = run.manifest()
    resumes = [*manifest.get("resumes", []), {"step": start.step, "checkpoint": str(start.checkpoint)}]
    resumes[-1] |= {"time": time.time(), "passed_over": [asdict(passed) for passed in start.passed_over]}
    run.write_manifest(resumes=resumes)
    if start.checkpoint.resolve().parent != run.checkpoints.resolve():
        run.write_manifest(started_from={"checkpoint": str(start.checkpoint), "step": start.step})


def check_resume(run: RunDirectory, resume: str) -> None:
    """Before a job is launched: whether there is anything to start from that it asks for.

    Raises:
        ConfigError: no checkpoint of the run is whole, or the given one is not.
    """
    own = checkpoints(run.checkpoints)
    if resume == NEVER:
        return
    if resume != AUTO and Path(resume).resolve().parent == run.checkpoints.resolve():
        raise ConfigError(
            f"resume={resume} is a checkpoint of this very run, which goes on from its newest: remove those after it"
        )
    if resume != AUTO and not own:
        problem = verify(Path(resume))
        if problem:
            raise ConfigError(f"resume={resume}: {problem}; give auto, never or a checkpoint that a run has left")
    passed = []
    for path in own:
        problem = verify(path)
        if problem is None:
            return
        passed.append(PassedOver(str(path), problem))
    if passed:
        raise ConfigError(no_checkpoint_left(run, passed))


def start_over(run: RunDirectory) -> None:
    """Removes what a run has left. A status stays until there is another one: without, the folder is nobody's."""
    if run.status():
        run.write_status("running")
    for path in run.path.iterdir():
        if path.name in ("status.json", CLAIM, RANKS):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def no_checkpoint_left(run: RunDirectory, passed: list[PassedOver]) -> str:
    reasons = "; ".join(each.reason for each in passed)
    return f"no checkpoint in {run.checkpoints} can be used: {reasons}. Start over with resume=never"
