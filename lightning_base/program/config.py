"""The schema of the configuration: what each key takes. ``read_config`` has the checks that cross fields."""

import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_base.instantiation import ConfigError, instantiate, require
from lightning_base.model_options import ModelOptions
from lightning_base.routing.router import Router

if typing.TYPE_CHECKING:
    from lightning_base.data import Corpus


@dataclass(frozen=True)
class ModuleConfig:
    learning_rate: float
    warmup_steps: int | float = 0
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
        warmup = 0 <= self.warmup_steps < 1 or (self.warmup_steps > 0 and isinstance(self.warmup_steps, int))
        accepted = "give a whole number of steps, or a share of the run below 1"
        require(warmup, "module.warmup_steps", self.warmup_steps, accepted)
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


def folder_name(name: object) -> str:
    """The folder of an experiment under ``runs_dir``, which Hydra makes before anything else is looked at.

    Raises:
        ConfigError: it would lie elsewhere.
    """
    path = str(name) in ("", ".", "..") or "/" in str(name)
    require(not path, "name", repr(name), "give a name for a folder under runs_dir")
    return str(name)


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
        folder_name(self.name)
        require(not self.runs_dir.startswith("~"), "runs_dir", self.runs_dir, "write out what ~ stands for")
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
        if type(router).forward is Router.forward:
            target = self.router["_target_"]
            raise ConfigError(
                f"router._target_={target} has no forward of its own: define one that gives a RoutingPlan"
            )
        return router

    def build_corpus(self) -> "Corpus":
        """Where the documents come from; nothing is read yet."""
        from lightning_base.data import Corpus

        corpus = instantiate(self.data.corpus, "data.corpus", Corpus, end_of_text=self.data.end_of_text)
        assert isinstance(corpus, Corpus)
        return corpus
