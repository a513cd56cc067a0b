"""When to save: every n steps, at the end, and when asked to stop, at a step boundary and on all ranks at once."""

import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_base.distributed.gradients import local
from lightning_base.module import LanguageModel
from lightning_base.non_finite import NonFiniteError
from lightning_base.program.checkpoint import checkpoints, on_all_ranks, step_of
from lightning_base.program.processes.launch import STOP_SIGNALS
from lightning_base.program.run_directory import RunDirectory

# What a checkpoint holds of the run beside Lightning's state: how long its log files were.
LOGS = "logs"


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

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # Ranks are signalled at different moments; they have to stop at the same step.
        if not trainer.strategy.reduce_boolean_decision(self.requested is not None, all=False):
            return
        assert isinstance(pl_module, LanguageModel)
        save(trainer, pl_module, self.run, self.keep)
        # An exception, not should_stop: Lightning would validate first, which a resumed run does by itself.
        raise PreemptedError(f"asked to stop; step {trainer.global_step} is saved", self.requested)

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
    """Saves every n steps and at the end, before the validation of that step; a run that resumes does that first.

    A checkpoint comes after all rows and events that its step has logged, and knows how long their files were: those
    are cut there when a run resumes, so that nothing is lost or doubled.

    Args:
        run: where checkpoints go.
        every_n_steps: n.
        keep: how many of the newest stay; with two, one is whole whatever happens. None keeps all of them, which shows
            how routing changed over training.

    Attributes:
        resumed: whether the run goes on from a checkpoint, until the first step after it.
    """

    def __init__(self, run: RunDirectory, every_n_steps: int, keep: int | None = 2) -> None:
        self.run, self.every_n_steps, self.keep = run, every_n_steps, keep
        self.resumed = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.validation_is_due(trainer):
            # As Lightning does after a batch; what it does on a restart by itself is to go on without.
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False
            trainer.validating = True
            loop.run()
            trainer.training = True
        self.resumed = False

    def validation_is_due(self, trainer: pl.Trainer) -> bool:
        """Whether the run goes on from a checkpoint whose step was to be validated."""
        if not (self.resumed and trainer.enable_validation):
            return False
        every = trainer.val_check_batch
        assert isinstance(every, int)
        return trainer.global_step * trainer.accumulate_grad_batches % every == 0

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

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[LOGS] = self.run.log_sizes()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.resumed = True
        # Lightning counts micro batches, of which a step may have had another number.
        done = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update(ready=done, started=done, processed=done, completed=done - 1)


def save(trainer: pl.Trainer, module: LanguageModel, run: RunDirectory, keep: int | None) -> None:
    """Saves a checkpoint named after the step and removes all but the newest ``keep``; all ranks take part.

    Raises:
        CheckpointError: it could not be written, on whichever rank.
    """
    path = run.checkpoints / f"step_{trainer.global_step}.ckpt"
    if str(path) in (module.last_checkpoint, module.unproven_checkpoint):
        return
    finite = all(bool(torch.isfinite(local(parameter)).all()) for parameter in module.parameters())
    # Ranks may hold different experts, and have to agree.
    if not trainer.strategy.reduce_boolean_decision(finite):
        return  # the next step will fail, and name the checkpoint before this one

    def write_logs() -> None:
        for logger in trainer.loggers:
            logger.save()  # TensorBoard's holds back what it is given
        run.sync_logs()

    on_all_ranks(write_logs if trainer.is_global_zero else lambda: None, f"the logs in {run.path} cannot be written")
    trainer.save_checkpoint(path)
    module.unproven_checkpoint = str(path)
    if trainer.is_global_zero and keep is not None:
        # One from later than this step is damaged, or of a future that did not happen: it does not count.
        past = [path for path in checkpoints(run.checkpoints) if step_of(path) <= trainer.global_step]
        for old in past[keep:]:
            trainer.strategy.remove_checkpoint(old)
