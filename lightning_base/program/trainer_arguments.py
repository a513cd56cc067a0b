"""Which arguments of Lightning's Trainer a configuration may add, as ``+trainer.limit_val_batches=2``.

All arms of a comparison take the same steps over the same batches, and the harness measures and saves them itself. An
argument that would change that is refused with the reason.
"""

import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING

from lightning_base.instantiation import ConfigError, check_arguments, did_you_mean

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

STEPS = "every arm takes the same steps: use trainer.max_steps"
VALIDATION = "validation is counted in optimizer steps: use trainer.validate_every_n_steps"
REFUSED = {
    "strategy": "ranks are started and timed out by the harness: use strategy=single or strategy=ddp",
    "max_epochs": STEPS,
    "min_epochs": STEPS,
    "min_steps": STEPS,
    "max_time": STEPS,
    "limit_train_batches": STEPS,
    "limit_test_batches": "results are taken over the whole validation split: limit_val_batches cuts the periodic ones",
    "overfit_batches": "Lightning would replace the loader that keeps the order of the batches: use debug=overfit",
    "fast_dev_run": "it leaves out loggers and checkpoints: use debug=fast",
    "barebones": "it leaves out everything that measures: use debug=fast",
    "val_check_interval": VALIDATION,
    "check_val_every_n_epoch": VALIDATION,
    "reload_dataloaders_every_n_epochs": "one loader gives the batches of the whole run",
    "use_distributed_sampler": "the data module shares the batches among the ranks, the same ones for every arm",
    "enable_checkpointing": "checkpoints are the harness's own: use trainer.checkpoint_every_n_steps",
    "enable_progress_bar": "use trainer.progress_bar",
    "default_root_dir": "every job has its own directory: use runs_dir and name",
    "logger": "use logger=tensorboard or another file of conf/logger",
    "callbacks": "a callback is code that may change the training, and a configuration is data",
    "plugins": "a plugin is code that may change the training, and a configuration is data",
    "profiler": "it slows every step that is measured: use debug=profile",
    "gradient_clip_algorithm": "gradients are clipped by the norm over all parameters: use trainer.gradient_clip_val",
    "model_registry": "checkpoints stay in the run directory",
}


def check_trainer_argument(name: str, value: object, own: Collection[str]) -> None:
    """Checks an entry of ``trainer`` that is no key of the harness's.

    Args:
        name: the key.
        value: what it was given.
        own: the harness's keys, for a name that may be one of them misspelt.

    Raises:
        ConfigError: the Trainer has no such argument, or takes another value, or the comparison does not bear it.
    """
    if name in REFUSED:
        raise ConfigError(refusal(name))
    arguments = set(inspect.signature(trainer()).parameters)
    if name not in arguments:
        near = did_you_mean(name, {*own, *arguments} - REFUSED.keys())
        raise ConfigError(f"trainer.{name} is no key of the configuration and no argument of Lightning's Trainer{near}")
    check_arguments({name: value}, trainer(), "trainer", hidden=set())
    if name.startswith("limit_") and not is_limit(value):
        raise ConfigError(
            f"trainer.{name}={value} is out of range: give a number of batches, or a share from 0.0 to 1.0"
        )


def without_plus(name: str) -> str | None:
    """What is wrong with ``trainer.NAME=...`` for an argument of the Trainer's; None for any other name."""
    if name in REFUSED:
        return refusal(name)
    if name in inspect.signature(trainer()).parameters:
        return f"trainer.{name} is an argument of Lightning's Trainer that is added with a plus: +trainer.{name}=..."
    return None


def refusal(name: str) -> str:
    """The sentence for an argument that is not passed on."""
    return f"trainer.{name} is not passed to Lightning's Trainer: {REFUSED[name]}"


def trainer() -> "type[Trainer]":
    """Lightning's Trainer, imported when it is asked for: it takes seconds, and most configurations add nothing."""
    from pytorch_lightning import Trainer

    return Trainer


def is_limit(value: object) -> bool:
    """Whether the Trainer takes a value as a number or a share of batches."""
    whole = isinstance(value, int) and value >= 0
    return value is None or whole or (isinstance(value, float) and 0 <= value <= 1)
