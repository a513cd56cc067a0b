"""Trains one arm: what every rank runs, ``python -m lightning_base.train RUN_DIRECTORY``."""

import ctypes
import logging
import os
import random
import signal
import sys
import time
import traceback
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_base import checkpoint
from lightning_base.callbacks.alarms import Alarms
from lightning_base.callbacks.assignment import AssignmentMonitor
from lightning_base.callbacks.causality import CausalityMonitor, DropByPosition
from lightning_base.callbacks.certificate import BatchFingerprint, Certificate
from lightning_base.callbacks.clock import TrainingClock
from lightning_base.callbacks.communication import Communication
from lightning_base.callbacks.compute_balance import ComputeBalance
from lightning_base.callbacks.expert_load import ExpertLoadLogger
from lightning_base.callbacks.heartbeat import Pulse
from lightning_base.callbacks.hparams import show_result
from lightning_base.callbacks.learnt_by_heart import LearntByHeart
from lightning_base.callbacks.machine import MachineMonitor
from lightning_base.callbacks.metrics_csv import MetricsCsv
from lightning_base.callbacks.progress import ArmProgressBar, ProgressFile
from lightning_base.callbacks.recording import PlanRecorder
from lightning_base.callbacks.routing_change import RoutingChange
from lightning_base.callbacks.routing_gap import RoutingGap
from lightning_base.callbacks.saving import PeriodicCheckpoint, PreemptedError, Preemption
from lightning_base.callbacks.step_profile import StepProfile
from lightning_base.callbacks.step_time import StepTime
from lightning_base.callbacks.tensorboard import Arrangement, Board
from lightning_base.claim import as_rank
from lightning_base.config import Config, check_devices, fit_schedule, read_config
from lightning_base.data import TextDataModule
from lightning_base.disk import full_disk
from lightning_base.distributed.expert_parallel import ExpertParallelStrategy
from lightning_base.distributed.heartbeat import Heartbeat
from lightning_base.distributed.launch import PREEMPTED, STOP_SIGNALS, die_with_parent
from lightning_base.instantiation import ConfigError
from lightning_base.loggers import finish_loggers, offline_loggers
from lightning_base.module import LanguageModel
from lightning_base.resume import begin, find_start
from lightning_base.run_directory import RunDirectory, write_json


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
    module = build_module(config)
    start = find_start(job, config.resume, module)
    resumed_step = start.step
    if rank_of_this_process() == 0:
        begin(job, start)
    module.last_checkpoint = str(start.checkpoint) if start.checkpoint else None
    every = config.trainer.log_every_n_steps
    clock, fingerprint = TrainingClock(every), BatchFingerprint()
    load = ExpertLoadLogger(directory / "expert_load.csv", every, resumed_step)
    loggers: list[Logger] = [MetricsCsv(directory / "metrics.csv", lambda: clock.seconds, resumed_step)]
    if config.logger.tensorboard:
        loggers.insert(0, Board(directory))
    loggers += offline_loggers(config, directory, plain)
    balance = ComputeBalance(directory / "compute_balance.csv", every, resumed_step)
    causality, gap = CausalityMonitor(), RoutingGap()
    # The step is taken apart next to the clock, so that the work of the other callbacks is in neither.
    callbacks: list[pl.Callback] = [clock, StepTime(every, clock), Communication(job, every, resumed_step)]
    callbacks += [fingerprint, load, Certificate(job, plain)]
    callbacks += [MachineMonitor(every, clock), AssignmentMonitor(every), balance, causality, gap, RoutingChange()]
    callbacks.append(DropByPosition(directory / "drop_by_position.csv", every, resumed_step))
    callbacks += [Alarms(job, every), Arrangement()]
    if config.trainer.record_plans:
        callbacks.append(PlanRecorder(job))
    if config.trainer.progress_bar:
        callbacks.append(ProgressFile(job) if job.output.exists() else ArmProgressBar(job))
    # After the bar, which has ended when they print.
    if config.trainer.profile_steps:
        callbacks.append(StepProfile(job.path / "profile", config.trainer.profile_steps))
    if config.data.distinct_batches:
        callbacks.append(LearntByHeart())
    # Last, so that a checkpoint holds what the others have counted up to this step.
    keep = config.trainer.keep_checkpoints
    saving = PeriodicCheckpoint(job, config.trainer.checkpoint_every_n_steps, keep)
    callbacks += [Pulse(heart)] if heart is not None else []
    callbacks += [saving, Preemption(job, keep)]
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
    for measured in (causality, gap, balance):
        metrics.update(measured.results)
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


def build_data(config: Config, prepared: str | None = None) -> TextDataModule:
    """The data of a run; nothing is read yet.

    Args:
        config: of the run.
        prepared: the name of the corpus's folder in ``data.cache_dir``, if it is known, so that nobody looks again.
    """
    options = {key: value for key, value in asdict(config.data).items() if key != "corpus"}
    return TextDataModule(
        config.build_corpus(),
        seed=config.seed,
        num_steps=config.trainer.max_steps,
        accumulation=config.trainer.accumulate_grad_batches,
        prepared=prepared,
        **options,
    )


def build_module(config: Config) -> LanguageModel:
    """The model and its optimizer, with its initial weights."""
    optimizer = asdict(fit_schedule(config)[0])
    start = optimizer.pop("initial_weights")
    module = LanguageModel(
        router=config.router,
        model=asdict(config.model),
        max_steps=config.trainer.max_steps,
        vocab_size=config.data.vocab_size,
        sequence_length=config.data.sequence_length,
        routing_group=config.data.routing_group,
        seed=config.seed,
        attend_across_documents=config.data.attend_across_documents,
        loss_coefficients=optimizer.pop("loss_coefficients"),
        router_init_scale=optimizer.pop("router_init_scale"),
        compile=optimizer.pop("compile"),
        activation_checkpointing=optimizer.pop("activation_checkpointing"),
        optimizer=optimizer,
    )
    if start is not None:
        load_weights(module, Path(start))
    return module


def load_weights(module: LanguageModel, path: Path) -> None:
    """Puts the weights of another run's checkpoint in the place of those drawn.

    Raises:
        ConfigError: the checkpoint is one of another model.
    """
    try:
        state = checkpoint.VerifiedCheckpointIO().load_checkpoint(path, weights_only=True)["state_dict"]
        module.load_state_dict(state, strict=True)
    except (KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"module.initial_weights={path} does not fit the model: {why}") from error


def build_trainer(config: Config, directory: Path, loggers: list[Logger], callbacks: list[pl.Callback]) -> pl.Trainer:
    """Lightning's Trainer: one epoch is the whole run, and data order and checkpoints are ours."""
    options = config.trainer
    accelerator = check_devices(options)
    batches = options.max_steps * options.accumulate_grad_batches
    # Said, because Lightning would take what it finds: Slurm's, for one.
    environment = TorchElasticEnvironment() if options.world_size > 1 else LightningEnvironment()
    trainer = pl.Trainer(
        default_root_dir=directory,
        accelerator=accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=build_strategy(config, accelerator),
        precision=options.precision,
        max_steps=options.max_steps,
        max_epochs=1,
        accumulate_grad_batches=options.accumulate_grad_batches,
        gradient_clip_val=options.gradient_clip_val,
        log_every_n_steps=options.log_every_n_steps,
        val_check_interval=min(batches, options.validate_every_n_steps * options.accumulate_grad_batches),
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=any(isinstance(callback, ArmProgressBar) for callback in callbacks),
        detect_anomaly=options.detect_anomaly,
        logger=loggers,
        callbacks=callbacks,
        plugins=[checkpoint.VerifiedCheckpointIO(), environment],
        **{"num_sanity_val_steps": 0, "enable_model_summary": False, **options.lightning},
    )
    # Its handlers broadcast from within a signal, and requeue jobs of Slurm; signals are Preemption's.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


class SingleProcess(checkpoint.SavesTogether, SingleDeviceStrategy):
    """One process with every expert."""


class Replicated(checkpoint.SavesTogether, DDPStrategy):
    """DDP: every rank holds every expert."""


def build_strategy(config: Config, accelerator: str) -> checkpoint.SavesTogether:
    """One process, or the ranks that torchrun has started, with a time-out on every collective."""
    if config.trainer.world_size == 1:
        return SingleProcess(device="cuda:0" if accelerator == "gpu" else "cpu")
    options: dict[str, Any] = {
        "process_group_backend": "nccl" if accelerator == "gpu" else "gloo",
        "timeout": timedelta(seconds=config.strategy.timeout_seconds),
    }
    if config.strategy.name == "ddp":
        return Replicated(**options)
    return ExpertParallelStrategy(
        expert_group=config.expert_group,
        shared="fsdp" if config.strategy.name == "fsdp" else config.strategy.shared,
        # Training sequences are padded only where a document is a sequence.
        same_sizes=config.data.packing == "packed",
        **options,
    )


def threads_per_rank(config: Config) -> int:
    """CPU threads of this rank: as configured, or the cores this process may use shared among the ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.trainer.threads or max(1, cores // config.trainer.devices)


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


def rank_of_this_process() -> int:
    """As torchrun has numbered it, before there is a process group."""
    return int(os.environ.get("RANK", 0))


def write_failure(job: RunDirectory, rank: int, error: BaseException) -> None:
    """Leaves what happened on this rank where the launcher finds it."""
    write_json(
        job.failures / f"rank_{rank}.json",
        {
            "time": time.time(),
            "rank": rank,
            "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
            "error": f"{type(error).__name__}: {error}",
            # All ranks fail with one whose part of a checkpoint cannot be written; only that one knows the cause.
            "elsewhere": isinstance(error, checkpoint.CheckpointError) and error.__cause__ is None,
            "traceback": "".join(traceback.format_exception(error)),
        },
    )


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
