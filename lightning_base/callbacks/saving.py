"""When to save: every n steps, at the end, and on SIGTERM, at a step boundary and on all ranks at once."""

import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_base.checkpoint import checkpoints, step_of
from lightning_base.gradients import local
from lightning_base.module import LanguageModel, NonFiniteError
from lightning_base.run_directory import RunDirectory


class PreemptedError(Exception):
    """The run was asked to stop, has saved, and can be resumed."""


class Preemption(pl.Callback):
    """Replaces Lightning's handler, which starts a collective inside the signal and ends the run with exit code 0."""

    def __init__(self, run: RunDirectory, keep: int | None = 2) -> None:
        self.run, self.keep = run, keep
        self.requested = False
        self.saved = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self._request)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The last step is saved: what is left can be done again, and need not hold up whoever preempts.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Only now has the step before been logged. An exception, not should_stop: Lightning would validate once more.
        if self.saved:
            raise PreemptedError(f"stopped by SIGTERM after step {trainer.global_step}, with a checkpoint")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if not self._requested_of_any(trainer):
            return
        assert isinstance(pl_module, LanguageModel)
        save(trainer, pl_module, self.run, self.keep)
        self.saved = True

    def _requested_of_any(self, trainer: pl.Trainer) -> bool:
        """Ranks are signalled at different moments; they have to stop at the same step."""
        if trainer.world_size == 1:
            return self.requested
        flag = torch.tensor(float(self.requested), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(flag, reduce_op="sum"))

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


class PeriodicCheckpoint(pl.Callback):
    """Saves every n steps and at the end.

    Args:
        run: where checkpoints go.
        every_n_steps: n.
        keep: how many of the newest stay; with two, one is whole whatever happens. None keeps all of them, which shows
            how routing changed over training.
    """

    def __init__(self, run: RunDirectory, every_n_steps: int, keep: int | None = 2) -> None:
        self.run, self.every_n_steps, self.keep = run, every_n_steps, keep

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            assert isinstance(pl_module, LanguageModel)
            save(trainer, pl_module, self.run, self.keep)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Started again, the run would go on from weights that give no finite loss, and fail again at once.
        assert isinstance(pl_module, LanguageModel)
        if isinstance(exception, NonFiniteError) and pl_module.unproven_checkpoint and trainer.is_global_zero:
            trainer.strategy.remove_checkpoint(pl_module.unproven_checkpoint)


def save(trainer: pl.Trainer, module: LanguageModel, run: RunDirectory, keep: int | None) -> None:
    """Saves a checkpoint named after the step and removes all but the newest ``keep``.

    All ranks take part, the first one writes.
    """
    path = run.checkpoints / f"step_{trainer.global_step}.ckpt"
    if str(path) in (module.last_checkpoint, module.unproven_checkpoint):
        return
    finite = all(bool(torch.isfinite(local(parameter)).all()) for parameter in module.parameters())
    # Ranks may hold different experts, and have to agree.
    if not trainer.strategy.reduce_boolean_decision(finite):
        return  # the next step will fail, and name the checkpoint before this one
    trainer.save_checkpoint(path)
    module.unproven_checkpoint = str(path)
    if trainer.is_global_zero and keep is not None:
        # One from later than this step is damaged, or of a future that did not happen: it does not count.
        past = [path for path in checkpoints(run.checkpoints) if step_of(path) <= trainer.global_step]
        for old in past[keep:]:
            trainer.strategy.remove_checkpoint(old)
