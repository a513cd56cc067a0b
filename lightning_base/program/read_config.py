"""From a composed configuration to the dataclasses of ``config``, checked across fields: a sentence per mistake."""

import dataclasses
import difflib
import importlib.util
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_base.instantiation import ConfigError, check_arguments, check_node, did_you_mean
from lightning_base.model_options import ModelOptions, read_model
from lightning_base.moe.shuffle import check_shuffle
from lightning_base.program.config import Config, LoggerConfig, ModuleConfig, TrainerConfig
from lightning_base.program.plugins import declare
from lightning_base.program.trainer_arguments import check_trainer_argument
from lightning_base.routing.router import Router


def read_config(node: Mapping[str, Any]) -> Config:
    """Checks a resolved configuration and gives it as dataclasses.

    Raises:
        ConfigError: one sentence about the first mistake.
    """
    config = _build(Config, node, "")
    declare(config.plugins)
    records = "plans" in wanted_callbacks(config.callbacks)
    if config.callbacks and records != config.trainer.record_plans:
        raise ConfigError(
            f"trainer.record_plans={str(config.trainer.record_plans).lower()} and callbacks.plans disagree: leave "
            "callbacks.plans as it is, and set trainer.record_plans"
        )
    try:
        _check_across(config)
    except ConfigError:
        raise
    except ValueError as error:
        # Routers and data know nothing of configurations; their sentences name the keys all the same.
        raise ConfigError(str(error)) from error
    return config


# What the program gives to a callback that has an argument of the name.
GIVEN_TO_CALLBACKS = frozenset(("run", "path", "folder", "log_every_n_steps", "resumed_step", "clock"))


def wanted_callbacks(callbacks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those whose ``when`` is not false, null or 0, without it; any that does not say so is wanted.

    Raises:
        ConfigError: a callback that cannot be.
    """
    import pytorch_lightning as pl

    found = {}
    for name, node in callbacks.items():
        if node.get("when", True):
            found[name] = {key: value for key, value in node.items() if key != "when"}
            check_node(found[name], f"callbacks.{name}", pl.Callback, hidden=set(GIVEN_TO_CALLBACKS))
    return found


def _build(schema: type, node: object, key: str) -> Any:
    if not isinstance(node, Mapping):
        raise ConfigError(f"{key}={node!r} should be a group of options")
    hints = typing.get_type_hints(schema)
    values: dict[str, Any] = dict(node)
    for name, hint in hints.items():
        if hint is ModelOptions and name in values:
            values[name] = read_model(values[name])
        elif dataclasses.is_dataclass(hint) and name in values:
            values[name] = _build(typing.cast(type, hint), values[name], f"{key}{name}.")
    if schema is TrainerConfig:
        return _build_trainer(values)
    return schema(**check_arguments(values, schema, key.rstrip("."), hidden=set()))


def _build_trainer(values: dict[str, Any]) -> TrainerConfig:
    own = {each.name for each in dataclasses.fields(TrainerConfig)} - {"lightning"}
    added = {name: value for name, value in values.items() if name not in own}
    for name, value in added.items():
        check_trainer_argument(name, value, own)
    given = {name: value for name, value in values.items() if name in own}
    return TrainerConfig(**check_arguments(given, TrainerConfig, "trainer", hidden={"lightning"}), lightning=added)


def _check_across(config: Config) -> None:
    """What no single field can know."""
    # Imported here: the order of the batches belongs to the data, which needs torch's loaders.
    from lightning_base.data import check_batch

    router = config.build_router()
    router.check_group(config.data.routing_group * config.data.sequence_length)
    router.check_run(dataclasses.asdict(config))
    config.model.check(
        router,
        vocab_size=config.data.vocab_size,
        sequence_length=config.data.sequence_length,
        within_documents=not config.data.attend_across_documents,
    )
    _check_losses(config, router)
    trainer = config.trainer
    if trainer.world_size > 1 and config.strategy.name == "single":
        raise ConfigError(
            f"trainer.devices={trainer.devices} and trainer.num_nodes={trainer.num_nodes} need several processes, "
            "which strategy=single does not start: add strategy=ddp"
        )
    _check_strategy(config, router)
    if trainer.num_nodes > 1 and config.strategy.max_restarts:
        raise ConfigError(
            f"strategy.max_restarts={config.strategy.max_restarts} works on one node, and "
            f"trainer.num_nodes={trainer.num_nodes}: leave it at 0, and start the same command again"
        )
    check_batch(
        config.data.global_batch, trainer.world_size, trainer.accumulate_grad_batches, config.data.routing_group
    )
    if config.model.shuffle_tokens is not False:
        if trainer.record_plans:
            raise ConfigError(
                "trainer.record_plans=true with model.shuffle_tokens: a recording is looked up by the tokens of whole "
                "routing groups, which the shuffle deals out; set one of the two to false"
            )
        check_shuffle(
            config.model.shuffle_tokens,
            router,
            routing_group=config.data.routing_group,
            global_batch=config.data.global_batch,
            accumulation=trainer.accumulate_grad_batches,
        )
    start = config.module.initial_weights
    if start is not None:
        from lightning_base.program.checkpoint import verify

        problem = verify(Path(start))
        if problem is not None:
            raise ConfigError(f"module.initial_weights={start}: {problem}; give a checkpoint that a run has left")


def _check_losses(config: Config, router: Router) -> None:
    """Whether every loss that is given a coefficient can be one.

    Arms of one sweep share the coefficients: a loss that only another router has is no mistake, a misspelt one is.
    """
    known = {"load_balancing_loss", "router_z_loss", *router.loss_coefficients}
    classes: list[type[Router]] = [Router]
    for each in classes:
        known.update(each.loss_coefficients)
        classes += each.__subclasses__()
    # A router of another package may return losses that it does not declare.
    foreign = config.plugins or not type(router).__module__.startswith("lightning_base.")
    for name in config.module.loss_coefficients:
        alike = difflib.get_close_matches(name, known, cutoff=0.8)
        if name not in known and (alike or not foreign):
            raise ConfigError(f"module.loss_coefficients.{name}: no router has such a loss{did_you_mean(name, known)}")


def fit_schedule(config: Config) -> tuple[ModuleConfig, list[str]]:
    """The schedule in steps of this run, cut where another key leaves it no room, and a sentence for each cut.

    A first try with ``trainer.max_steps=4`` or a low rate should not fail on a default that nobody thought of.
    """
    module, steps = config.module, config.trainer.max_steps
    share = module.warmup_steps if module.warmup_steps < 1 else 0
    cut: dict[str, float] = {"warmup_steps": int(share * steps)} if share else {}
    sentences = []
    if module.warmup_steps > steps:
        cut["warmup_steps"] = steps // 8
        sentences.append(
            f"module.warmup_steps={module.warmup_steps} exceeds trainer.max_steps={steps}: warming up for {steps // 8}"
        )
    if module.final_learning_rate > module.learning_rate:
        cut["final_learning_rate"] = module.learning_rate / 10
        sentences.append(
            f"module.final_learning_rate={module.final_learning_rate:g} exceeds module.learning_rate="
            f"{module.learning_rate:g}: ending at {module.learning_rate / 10:g}"
        )
    return dataclasses.replace(module, **cut), sentences  # type: ignore[arg-type]


def _check_strategy(config: Config, router: Router) -> None:
    """Whether ranks can share experts and parameters as they are told to."""
    trainer, group = config.trainer, config.expert_group
    if trainer.world_size % group:
        raise ConfigError(
            f"strategy.expert_group={group} does not divide the {trainer.world_size} ranks of trainer.devices x "
            f"trainer.num_nodes = {trainer.devices} x {trainer.num_nodes}: choose one that does, or null for all ranks"
        )
    # A single expert is copied, so that a dense arm can be compared.
    if router.num_experts > 1 and router.num_experts % group:
        raise ConfigError(
            f"router.num_experts={router.num_experts} cannot be shared equally by the {group} ranks of an expert "
            f"group: choose a multiple of {group}, or a smaller strategy.expert_group"
        )
    if config.strategy.name in ("expert_parallel", "fsdp") and trainer.precision == "16-mixed":
        raise ConfigError(
            f"trainer.precision=16-mixed with strategy={config.strategy.name}: ranks that hold different parameters "
            "would skip different steps when a gradient overflows; use bf16-mixed"
        )


def check_devices(trainer: TrainerConfig) -> str:
    """The accelerator to use, ``cpu`` or ``gpu``; raises ConfigError for devices that this machine does not have."""
    import torch

    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accelerator = trainer.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if available else "cpu"
    if accelerator == "gpu" and trainer.devices > available:
        raise ConfigError(
            f"trainer.devices={trainer.devices} with trainer.accelerator={trainer.accelerator}, but this machine has "
            f"{available} GPU{'s' * (available != 1)}: use fewer devices, or trainer.accelerator=cpu"
        )
    if accelerator == "cpu" and trainer.precision == "16-mixed":
        raise ConfigError("trainer.precision=16-mixed needs a GPU: use 32-true or bf16-mixed on a CPU")
    return accelerator


def check_loggers(logger: LoggerConfig) -> None:
    """Raises ConfigError for a logger whose package is an extra that is not installed."""
    for name in ("wandb", "mlflow"):
        if getattr(logger, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"logger.{name}=true needs a package that is not installed: "
                f"pip install 'lightning-base[{name}]', or choose logger=tensorboard"
            )
