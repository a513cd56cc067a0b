"""The schema of the configuration, and the checks that cross fields: one sentence for every mistake."""

import dataclasses
import importlib.util
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_base.instantiation import ConfigError, check_arguments, check_node, instantiate, require
from lightning_base.model_options import ModelOptions, read_model
from lightning_base.moe.shuffle import check_shuffle
from lightning_base.program.plugins import declare
from lightning_base.program.trainer_arguments import check_trainer_argument
from lightning_base.routing.router import Router

if typing.TYPE_CHECKING:
    from lightning_base.data import Corpus


@dataclass(frozen=True)
class ModuleConfig:
    learning_rate: float
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_learning_rate: float = 0.0
    router_learning_rate_factor: float = 1.0
    router_init_scale: float = 1.0
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    loss_coefficients: dict[str, float] = field(default_factory=dict)
    initial_weights: str | None = None
    compile: bool = False
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        positive = 0 < self.learning_rate < math.inf
        require(positive, "module.learning_rate", self.learning_rate, "give a number above 0")
        final = 0 <= self.final_learning_rate < math.inf
        require(final, "module.final_learning_rate", self.final_learning_rate, "give 0 or more")
        require(self.warmup_steps >= 0, "module.warmup_steps", self.warmup_steps, "give 0 or more")
        for key in ("router_learning_rate_factor", "router_init_scale"):
            require(0 < getattr(self, key) < math.inf, f"module.{key}", getattr(self, key), "give a number above 0")
        require(self.weight_decay >= 0, "module.weight_decay", self.weight_decay, "give 0 or more")
        betas = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(betas, "module.betas", self.betas, "give two numbers from 0 to below 1")
        for name, coefficient in self.loss_coefficients.items():
            require(coefficient >= 0, f"module.loss_coefficients.{name}", coefficient, "give 0 or more")


@dataclass(frozen=True)
class DataConfig:
    corpus: dict[str, Any]
    vocab_size: int
    sequence_length: int
    global_batch: int
    routing_group: int
    validation_fraction: float
    cache_dir: str
    tokenizer: str | None = None
    end_of_text: str | int | None = None
    packing: Literal["packed", "documents"] = "packed"
    attend_across_documents: bool = True
    validation_sequences: int | None = None
    num_workers: int = 0
    distinct_batches: int | None = None

    def __post_init__(self) -> None:
        require(self.vocab_size >= 2, "data.vocab_size", self.vocab_size, "give at least 2")
        require(self.sequence_length >= 2, "data.sequence_length", self.sequence_length, "give at least 2")
        require(self.global_batch >= 1, "data.global_batch", self.global_batch, "give at least 1 sequence")
        require(self.routing_group >= 1, "data.routing_group", self.routing_group, "give at least 1 sequence")
        fraction = 0 < self.validation_fraction < 1
        require(fraction, "data.validation_fraction", self.validation_fraction, "give a share between 0 and 1")
        limit = self.validation_sequences is None or self.validation_sequences >= 1
        require(limit, "data.validation_sequences", self.validation_sequences, "give at least 1, or null for all")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "give 0 or more")
        distinct = self.distinct_batches is None or self.distinct_batches >= 1
        require(
            distinct, "data.distinct_batches", self.distinct_batches, "give at least 1, or null for new text always"
        )


@dataclass(frozen=True)
class StrategyConfig:
    name: Literal["single", "ddp", "expert_parallel", "fsdp"] = "single"
    timeout_seconds: int = 180
    max_restarts: int = 0
    expert_group: int | None = None
    shared: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        require(self.timeout_seconds >= 1, "strategy.timeout_seconds", self.timeout_seconds, "give at least 1")
        require(self.max_restarts >= 0, "strategy.max_restarts", self.max_restarts, "give 0 or more")
        group = self.expert_group is None or self.expert_group >= 1
        require(group, "strategy.expert_group", self.expert_group, "give at least 1 rank, or null for all")


@dataclass(frozen=True)
class TrainerConfig:
    max_steps: int
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "32-true"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    log_every_n_steps: int = 10
    validate_every_n_steps: int = 50
    checkpoint_every_n_steps: int = 100
    keep_checkpoints: int | None = 2
    threads: int | None = None
    progress_bar: bool = True
    detect_anomaly: bool = False
    record_plans: bool = False
    profile_steps: int | None = None
    # What else the configuration has under ``trainer``, for Lightning's Trainer as it is.
    lightning: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = ("max_steps", "devices", "num_nodes", "accumulate_grad_batches", "log_every_n_steps")
        for key in (*counts, "validate_every_n_steps", "checkpoint_every_n_steps"):
            require(getattr(self, key) >= 1, f"trainer.{key}", getattr(self, key), "give at least 1")
        clip = self.gradient_clip_val is None or self.gradient_clip_val > 0
        require(clip, "trainer.gradient_clip_val", self.gradient_clip_val, "give a norm above 0, or null")
        threads = self.threads is None or self.threads >= 1
        require(threads, "trainer.threads", self.threads, "give at least 1, or null")
        keep = self.keep_checkpoints is None or self.keep_checkpoints >= 1
        require(keep, "trainer.keep_checkpoints", self.keep_checkpoints, "give at least 1, or null to keep all")
        room = self.profile_steps is None or 1 <= self.profile_steps <= self.max_steps - 3
        accepted = f"give at least 1, and 3 fewer than trainer.max_steps={self.max_steps}, whose first 3 warm up"
        require(room, "trainer.profile_steps", self.profile_steps, accepted)

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes


@dataclass(frozen=True)
class LoggerConfig:
    tensorboard: bool = True
    wandb: bool = False
    mlflow: bool = False


@dataclass(frozen=True)
class Config:
    """One training run. ``router`` stays a mapping: each router brings its own options."""

    name: str
    runs_dir: str
    seed: int
    router: dict[str, Any]
    model: ModelOptions
    module: ModuleConfig
    data: DataConfig
    strategy: StrategyConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    resume: str = "auto"
    plugins: list[str] = field(default_factory=list)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.name in ("", ".", "..") or "/" in self.name
        require(not path, "name", repr(self.name), "give a name for a folder under runs_dir")
        require(0 <= self.seed < 2**63, "seed", self.seed, "give 0 or more")

    @property
    def expert_group(self) -> int:
        """Ranks that share the experts of a layer; 1 where every rank holds all of them."""
        if self.strategy.name != "expert_parallel":
            return 1
        return self.strategy.expert_group or self.trainer.world_size

    def build_router(self) -> Router:
        """A router of this configuration, with parameters not yet drawn."""
        router = instantiate(
            self.router, "router", Router, width=self.model.router_width, vocab_size=self.data.vocab_size
        )
        assert isinstance(router, Router)
        return router

    def build_corpus(self) -> "Corpus":
        """Where the documents come from; nothing is read yet."""
        from lightning_base.data import Corpus

        corpus = instantiate(self.data.corpus, "data.corpus", Corpus, end_of_text=self.data.end_of_text)
        assert isinstance(corpus, Corpus)
        return corpus


def read_config(node: Mapping[str, Any]) -> Config:
    """Checks a resolved configuration and gives it as dataclasses.

    Raises:
        ConfigError: one sentence about the first mistake.
    """
    config = _build(Config, node, "")
    declare(config.plugins)
    wanted_callbacks(config.callbacks)
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
    for name in config.module.loss_coefficients:
        # Arms of one sweep share this setting, so a loss that only another router has is no mistake; a misspelt one is.
        if not name.endswith("_loss"):
            raise ConfigError(f"module.loss_coefficients.{name} names no loss: e.g. load_balancing_loss")
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


def fit_schedule(config: Config) -> tuple[ModuleConfig, list[str]]:
    """The schedule cut to the run where another key leaves it no room, and a sentence for each cut.

    A first try with ``trainer.max_steps=4`` or a low rate should not fail on a default that nobody thought of.
    """
    module, steps = config.module, config.trainer.max_steps
    cut: dict[str, float] = {}
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
                f".venv/bin/pip install -c constraints.txt -e '.[{name}]', or choose logger=tensorboard"
            )
