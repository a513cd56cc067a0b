"""Says at every stage of a step that this rank goes on: see ``program/processes/heartbeat.py``."""

from typing import Any

import pytorch_lightning as pl

from lightning_base.program.processes.heartbeat import Heartbeat


class Pulse(pl.Callback):
    """From the thread that trains, so that it stands still when training does.

    Args:
        heart: of this rank.
    """

    def __init__(self, heart: Heartbeat) -> None:
        self.heart = heart

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.heart.beat("in the forward pass", trainer.global_step, new_round=True)

    def on_before_backward(self, trainer: pl.Trainer, *args: Any) -> None:
        self.heart.beat("in the backward pass", trainer.global_step)

    def on_after_backward(self, trainer: pl.Trainer, *args: Any) -> None:
        self.heart.beat("after the backward pass", trainer.global_step)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        self.heart.beat("in the optimizer", trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.heart.beat("between two steps", trainer.global_step)

    def on_save_checkpoint(self, trainer: pl.Trainer, *args: Any) -> None:
        self.heart.beat("in a save", trainer.global_step)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.heart.beat("in validation", trainer.global_step, new_round=True)

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.heart.beat("after validation", trainer.global_step, new_round=True)

    def on_test_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.heart.beat("in the final evaluation", trainer.global_step, new_round=True)

    def on_test_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.heart.beat("after the final evaluation", trainer.global_step, new_round=True)
