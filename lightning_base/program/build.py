"""From a configuration to what Lightning trains: data, module, callbacks, strategy and Trainer."""

import os
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from lightning_base.callbacks.clock import TrainingClock
from lightning_base.callbacks.progress import ArmProgressBar
from lightning_base.data import TextDataModule
from lightning_base.distributed.expert_parallel import ExpertParallelStrategy
from lightning_base.instantiation import ConfigError, instantiate
from lightning_base.module import LanguageModel
from lightning_base.program import checkpoint
from lightning_base.program.config import Config
from lightning_base.program.read_config import GIVEN_TO_CALLBACKS, check_devices, fit_schedule, wanted_callbacks
from lightning_base.program.run_directory import RunDirectory


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


def build_module(config: Config, rank: int = 0, ranks: int = 1) -> LanguageModel:
    """The model and its optimizer, with its initial weights; of experts that ranks share, those of one rank."""
    optimizer = asdict(fit_schedule(config)[0])
    start = optimizer.pop("initial_weights")
    shared = ranks > 1 and config.expert_group > 1 and config.build_router().num_experts > 1
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
        expert_share=(rank % config.expert_group, config.expert_group) if shared else (0, 1),
        optimizer=optimizer,
    )
    if start is not None:
        load_weights(module, Path(start))
    return module


def load_weights(module: LanguageModel, path: Path) -> None:
    """Puts the weights of another run's checkpoint in the place of those drawn.

    From a dense arm, whose layers have one expert each, every expert starts as a copy of it, and routers stay as drawn.

    Raises:
        ConfigError: the checkpoint is one of another model.
    """
    layers = module.expert_parameters
    try:
        there = checkpoint.load(path, device="meta")["state_dict"]
        # Of a dense arm there is one row, which is for all.
        alike = [name for name in layers if name in there and len(there[name]) == layers[name].experts.num_experts]
        state = checkpoint.load(path, alike, layers[alike[0]].experts.held if alike else None)["state_dict"]
        module.load_state_dict(upcycled(state, module), strict=True)
    except (KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"module.initial_weights={path} does not fit the model: {why}") from error


def upcycled(state: dict[str, Tensor], module: LanguageModel) -> dict[str, Tensor]:
    """The state of a dense arm for a module with several experts; any other state as it is."""
    layers = module.expert_parameters
    now = module.state_dict(keep_vars=True)
    copied = {
        name: state[name].expand_as(value)
        for name, value in now.items()
        if name in layers and name in state and len(state[name]) == 1 and state[name].shape[1:] == value.shape[1:]
    }
    if not copied or len(copied) < len(layers):
        return state
    routers = {name: value for name, value in now.items() if ".router." in name and name not in state}
    return {**state, **copied, **routers}


def build_callbacks(
    config: Config, run: RunDirectory, resumed_step: int | None, clock: TrainingClock
) -> list[pl.Callback]:
    """What watches a run, as ``conf/callbacks`` lists it: each is given what it asks for by the name of an argument.

    Args:
        config: of the run.
        run: where it writes; ``path`` is the CSV file of the callback's own name in it, ``folder`` the folder.
        resumed_step: the step from which the run goes on, or None.
        clock: that of the run, which leaves out what is not training.
    """
    given = {
        "run": run,
        "log_every_n_steps": config.trainer.log_every_n_steps,
        "resumed_step": resumed_step,
        "clock": clock,
    }
    found = []
    for name, node in wanted_callbacks(config.callbacks).items():
        given |= {"path": run.path / f"{name}.csv", "folder": run.path / name}
        assert given.keys() == GIVEN_TO_CALLBACKS
        found.append(instantiate(node, f"callbacks.{name}", pl.Callback, **given))
    return found


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
