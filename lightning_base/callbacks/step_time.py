"""Where the time of a training step goes.

Shapes: W ranks.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_base.callbacks.clock import TrainingClock
from lightning_base.metrics.compute import idle_fraction
from lightning_base.module import LanguageModel
from lightning_base.moe.stopwatch import Stopwatch

PHASES = (
    "router",
    "assignment",
    "dispatch",
    "experts",
    "combine",
    "other_forward",
    "waiting",
    "backward_and_optimizer",
)


class StepTime(pl.Callback):
    """Takes the logged optimizer steps apart: ``train_time/<phase>`` [s per step] and ``train_time/share_<phase>``.

    Means over ranks, summed over layers and micro batches; the phases add up to the step, the shares to 1.

    ``router``, ``dispatch``, ``experts``, ``combine``: the sparse layers in the forward pass. Shuffling and sending
    tokens is in ``dispatch``, their way back in ``combine``. Passes that route micro batches ahead for a balancing loss
    over the step count; what activation checkpointing computes again does not: it is in the backward pass.
    ``assignment``: of the router's time, what solving or approximating a balanced assignment took
    (``assignment_seconds`` of the plans); ``router`` is the rest.
    ``other_forward``: attention, dense layers, embedding, the loss, and callbacks at the start of a batch.
    ``waiting``: how much earlier than the last one a rank reaches the step's first gradient reduction, which begins
    with the backward pass of the last micro batch: max - mean over ranks of the time until then. There is no barrier:
    it would cost time itself. Ranks that differ in the backward pass wait as well, hidden in a reduction that overlaps
    it; that wait stays in ``backward_and_optimizer``, and so does communication. With an auxiliary loss over the whole
    step ranks meet in the forward pass already, and wait in ``other_forward``.
    ``backward_and_optimizer``: the rest of the step.

    ``train_time/idle_fraction``: 1 - mean/max over ranks of the measured time in ``experts``.

    On a GPU a measured step waits for the device after each phase and is a little slower than others; a compiled model
    has a compiled variant for these steps, broken at the phases. The first step is measured too, with its warm-up.

    Args:
        log_every_n_steps: optimizer steps between two measured steps; the first step is measured too.
        clock: knows how long a batch took; it comes earlier in the list of callbacks.
    """

    def __init__(self, log_every_n_steps: int, clock: TrainingClock) -> None:
        self.log_every_n_steps, self.clock = log_every_n_steps, clock
        self._watch: Stopwatch | None = None
        self._began = 0.0
        self._times = dict.fromkeys(("assignment", "local", "forward", "step"), 0.0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        step = batch_idx // trainer.accumulate_grad_batches + 1
        if step % self.log_every_n_steps and step != 1:
            return
        if self._watch is None:
            self._watch = Stopwatch(pl_module.device)
            for layer in pl_module.model.sparse_layers.values():
                layer.stopwatch = self._watch
        self._watch.paused = False
        self._began = self._watch.now()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._watch is None:
            return
        assert isinstance(pl_module, LanguageModel)
        # Activation checkpointing calls the layers again in the backward pass.
        self._watch.paused = True
        taken = self._watch.now() - self._began
        self._times["forward"] += taken
        self._times["local"] = self._times["step"] + taken
        plans = pl_module.plans.values()
        self._times["assignment"] += sum(float(p.aux.get("assignment_seconds", 0.0)) for p in plans)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._watch is None:
            return
        assert isinstance(pl_module, LanguageModel)
        self._times["step"] += self.clock.taken
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        seconds = {**self._watch.seconds, **self._times}
        for layer in pl_module.model.sparse_layers.values():
            layer.stopwatch = None
        self._watch, self._times = None, dict.fromkeys(self._times, 0.0)
        mine = torch.tensor(list(seconds.values()), dtype=torch.float64, device=pl_module.device)
        ranks = trainer.strategy.all_gather(mine).reshape(-1, len(mine)).cpu()
        values = decompose(dict(zip(seconds, ranks.T, strict=True)))
        for logger in trainer.loggers:
            logger.log_metrics({f"train_time/{name}": value for name, value in values.items()}, trainer.global_step)


def decompose(seconds: dict[str, Tensor]) -> dict[str, float]:
    """The phases of one step as means over ranks, their shares of it, and the idle fraction.

    Args:
        seconds: [W] each: the stopwatch's phases; ``assignment``, a part of ``router``; ``forward``, all forward
            passes; ``local``, from the start of the step to its last backward pass; ``step``.
    """
    mean = {name: float(by_rank.mean()) for name, by_rank in seconds.items()}
    sparse = sum(mean[phase] for phase in ("router", "dispatch", "experts", "combine"))
    waiting = float(seconds["local"].max()) - mean["local"]
    phases = {
        **mean,
        "router": mean["router"] - mean["assignment"],
        "other_forward": mean["forward"] - sparse,
        "waiting": waiting,
        "backward_and_optimizer": mean["step"] - mean["forward"] - waiting,
    }
    result = {phase: phases[phase] for phase in PHASES}
    result |= {f"share_{phase}": phases[phase] / mean["step"] for phase in PHASES}
    return {**result, "idle_fraction": float(idle_fraction(seconds["experts"]))}
