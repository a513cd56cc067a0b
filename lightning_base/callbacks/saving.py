"""When to save: every n steps, at the end, and when asked to stop, at a step boundary and on all ranks at once."""

import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_base.distributed.launch import STOP_SIGNALS
from lightning_base.module import LanguageModel, NonFiniteError
from lightning_base.run_directory import RunDirectory


class PreemptedError(Exception):
    """The run was asked to stop, has saved, and can be resumed.

    Attributes:
        signal: the one this rank got, None if another rank did.
    """

    def __init__(self, sentence: str, signal: str | None = None) -> None:
        super().__init__(sentence)
        self.signal = signal


class Preemption(pl.Callback):
    """Saves at the next step boundary after SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 to any rank, and leaves.

    Before the first step and after the last, a signal does what it did before: there is nothing to save.
    """

    def __init__(self, run: RunDirectory, keep: int | None = 2) -> None:
        self.run, self.keep = run, keep
        self.requested: str | None = None
        self.saved = False
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before = {number: signal.signal(number, self._request) for number in STOP_SIGNALS}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The last step is saved: what is left can be done again, and need not hold up whoever preempts.
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Asked to stop, a rank gets the signal more than once: from torchrun, and from whoever asks all processes.
        if not isinstance(exception, PreemptedError):
            self._restore()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Only now has the step before been logged. An exception, not should_stop: Lightning would validate once more.
        if self.saved:
            raise PreemptedError(f"asked to stop; step {trainer.global_step} is saved", self.requested)

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
        requested = self.requested is not None
        if trainer.world_size == 1:
            return requested
        flag = torch.tensor(float(requested), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(flag, reduce_op="sum"))

    def _request(self, number: int, frame: FrameType | None) -> None:
        again = self.requested is not None
        self.requested = signal.Signals(number).name
        if again and number == signal.SIGINT and callable(before := self._before[number]):
            before(number, frame)  # a second Ctrl-C where the run has the process of the command

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


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
    if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
        return  # the next step will fail, and name the checkpoint before this one
    trainer.save_checkpoint(path)
    module.unproven_checkpoint = str(path)
    if trainer.is_global_zero and keep is not None:
        ordered = sorted(run.checkpoints.glob("step_*.ckpt"), key=lambda p: int(p.stem.split("_")[1]))
        for old in ordered[:-keep]:
            trainer.strategy.remove_checkpoint(old)
