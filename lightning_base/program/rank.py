"""Trains one arm: what every rank runs, ``python -m lightning_base.program.rank RUN_DIRECTORY``."""

import ctypes
import logging
import os
import random
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.loggers import Logger

from lightning_base.callbacks.certificate import BatchFingerprint, Certificate
from lightning_base.callbacks.clock import TrainingClock
from lightning_base.callbacks.expert_load import ExpertLoadLogger
from lightning_base.callbacks.heartbeat import Pulse
from lightning_base.callbacks.hparams import show_result
from lightning_base.callbacks.metrics_csv import MetricsCsv
from lightning_base.callbacks.progress import ArmProgressBar, ProgressFile
from lightning_base.callbacks.saving import PeriodicCheckpoint, PreemptedError, Preemption
from lightning_base.callbacks.tensorboard import Board
from lightning_base.distributed.reduction import rank_of_this_process
from lightning_base.instantiation import ConfigError
from lightning_base.program import checkpoint
from lightning_base.program.build import build_callbacks, build_data, build_module, build_trainer, threads_per_rank
from lightning_base.program.claim import as_rank
from lightning_base.program.config import Config
from lightning_base.program.disk import full_disk
from lightning_base.program.failure import write_failure
from lightning_base.program.loggers import finish_loggers, offline_loggers
from lightning_base.program.processes.heartbeat import Heartbeat
from lightning_base.program.processes.launch import PREEMPTED, STOP_SIGNALS, die_with_parent
from lightning_base.program.read_config import read_config
from lightning_base.program.resume import begin, find_start
from lightning_base.program.run_directory import RunDirectory


class DiskFullError(Exception):
    """There is no room for what a run writes; one sentence says what is safe, and how to go on."""


@dataclass(frozen=True)
class Result:
    """How a run ended: ``state`` is ``done`` or ``preempted``; ``metrics`` are those of the final evaluation.

    ``signal`` is the one by which this rank was asked to stop.
    """

    state: str
    directory: Path
    metrics: dict[str, float]
    signal: str | None = None


def run(config: Config, directory: Path, heart: Heartbeat | None = None) -> Result:
    """Trains and evaluates one arm as one rank of a process tree, or the only one.

    Picks up from the newest checkpoint in ``directory`` that can be loaded, if there is one. Leaves ``status.json`` at
    ``running``: whoever launched the tree knows whether all of it ended well.
    """
    job = RunDirectory(directory)
    plain = yaml.safe_load(job.config.read_text())
    seed_everything(config.seed)
    torch.set_num_threads(threads_per_rank(config))

    data = build_data(config, job.prepared_corpus())
    module = build_module(config, rank_of_this_process(), config.trainer.world_size)
    start = find_start(job, config.resume, module.whole_shapes(), config.strategy.timeout_seconds)
    resumed_step = start.step
    if rank_of_this_process() == 0:
        begin(job, start)
    module.last_checkpoint = str(start.checkpoint) if start.checkpoint else None
    every, keep = config.trainer.log_every_n_steps, config.trainer.keep_checkpoints
    clock, fingerprint = TrainingClock(every), BatchFingerprint()
    load = ExpertLoadLogger(directory / "expert_load.csv", every, resumed_step)
    saving = PeriodicCheckpoint(job, config.trainer.checkpoint_every_n_steps, keep)
    watching = build_callbacks(config, job, resumed_step, clock)
    callbacks: list[pl.Callback] = [clock, *watching, fingerprint, load, Certificate(job, plain)]
    if config.trainer.progress_bar:
        callbacks.append(ProgressFile(job) if job.output.exists() else ArmProgressBar(job))
    callbacks += [Pulse(heart)] if heart is not None else []
    # Last, so that a checkpoint holds what the others have counted up to this step.
    callbacks += [saving, Preemption(job, keep)]
    loggers: list[Logger] = [MetricsCsv(directory / "metrics.csv", lambda: clock.seconds, resumed_step)]
    if config.logger.tensorboard:
        loggers.insert(0, Board(directory))
    loggers += offline_loggers(config, directory, plain)
    trainer = build_trainer(config, directory, loggers, callbacks)

    try:
        trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
        if saving.validation_is_due(trainer):  # after the last step
            trainer.validate(module, datamodule=data, verbose=False)
    except PreemptedError as error:
        return Result("preempted", directory, {}, error.signal)
    metrics: dict[str, float] = {}
    for mode in (None, *list(module.evaluation_modes)[1:]):
        module.set_evaluation_mode(mode)
        (values,) = trainer.test(module, datamodule=data, verbose=False)
        metrics.update(values)
    metrics.pop("step", None)
    for callback in watching:
        metrics.update(getattr(callback, "results", {}))
    batch_fingerprint, sequences = fingerprint.combined()
    totals = load.combined_totals()
    if trainer.is_global_zero:
        job.write_manifest(
            batch_fingerprint=batch_fingerprint,
            steps=trainer.global_step,
            sequences=sequences,
            tokens=totals["tokens"],
            assignments=totals["assignments"],
            assignments_dropped=totals["dropped"],
            training_seconds=round(clock.seconds, 3),
            result=metrics,
        )
        if metrics and isinstance(loggers[0], Board):
            show_result(loggers[0], config, job)
    return Result("done", directory, metrics)


def seed_everything(seed: int) -> None:
    """Seeds every generator; weights and data have seeds of their own that do not depend on these."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed instead of giving it back to the system and fetching it anew at every step.

    Every tensor above 32 MiB would otherwise be mapped, zeroed page by page and unmapped each time.
    """
    trim_threshold, mmap_max = -1, -4  # names of malloc.h
    with suppress(AttributeError):  # glibc has it
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def quiet() -> None:
    """Turns off Lightning's announcements, and its warnings that advise against what this program does on purpose."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Only with +trainer.enable_model_summary=true, and then it is what was asked for.
    logging.getLogger("pytorch_lightning.callbacks.model_summary").setLevel(logging.INFO)
    for message in (
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # our metrics are synchronised already
        ".*does not have many workers.*",
        ".*number of training batches .* is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*GPU available but not used.*",
        ".*`srun` command is available on your system but is not used.*",  # torchrun starts the ranks
        ".*functional.all_gather is deprecated.*",  # Lightning's own call
    ):
        warnings.filterwarnings("ignore", message=message)


def main(directory: Path) -> int:
    """One rank of a job; gives the exit code. A failure is written to a file before anything can hang."""
    quiet()
    keep_freed_memory()
    job = RunDirectory(directory)
    rank = rank_of_this_process()
    heart = Heartbeat(job.heartbeats, rank)
    heart.beat("at the start")
    try:
        config = read_config(yaml.safe_load(job.config.read_text()))
        with as_rank(directory):
            result = run(config, directory, heart)
    except BaseException as error:
        job.release_room()
        if full_disk(error):
            said = DiskFullError(f"{full_disk(error)}; {checkpoint.what_is_safe(job.checkpoints)}")
            write_failure(job, rank, said.with_traceback(error.__traceback__))
            raise said from error
        write_failure(job, rank, error)
        if isinstance(error, ConfigError):
            return 2
        raise
    finally:
        finish_loggers()
    if rank == 0:
        job.release_room()
    heart.beat(result.state)
    if result.state == "preempted" and rank == 0:
        job.write_status("preempted", step=heart.step, signal=result.signal)
    # torchrun would start a rank anew, and end the others, for any other code.
    return PREEMPTED if result.state == "preempted" and config.trainer.world_size == 1 else 0


def rank(directory: Path) -> NoReturn:
    """One rank of a job in a process of its own, which ends with it."""
    code = 1
    # Before and after training, a signal ends the process at once: no KeyboardInterrupt that looks like an error.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    try:
        code = main(directory)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: with another rank gone, tearing down the process group may wait for it.
    os._exit(code)


if __name__ == "__main__":
    die_with_parent()
    rank(Path(sys.argv[1]))
