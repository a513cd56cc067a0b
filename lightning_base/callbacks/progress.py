"""A progress bar that says which arm of how many is running and how long is left; or a file that says so."""

import sys
import time
from typing import Any, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm

from lightning_base.callbacks.alarms import Alarms
from lightning_base.module import LanguageModel
from lightning_base.program.run_directory import RunDirectory, read_json

# How often the bar looks at what takes time to see.
LOOK_SECONDS = 1.0


class Others(NamedTuple):
    """The other arms of a sweep: how long those that are done took, their number, and how many are to come."""

    seconds: float
    done: int
    ahead: int


class ArmProgressBar(TQDMProgressBar):
    """Lightning's bar with the arm of the sweep, and an estimate for the arms still to come.

    The estimate takes the mean of the arms that are done, or this arm's own pace if it is the first.
    """

    def __init__(self, run: RunDirectory) -> None:
        # Written to a file, a bar is a line per refresh: fewer of them.
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 25)
        self.run = run
        self.labels: dict[str, str] = read_json(run.path.parent / "sweep.json").get("jobs", {})
        self.jobs = list(self.labels)
        self._began = time.time()
        self._looked_at = -LOOK_SECONDS
        self._loss: dict[str, float] = {}
        self._others = Others(0.0, 0, 0)

    def arm(self) -> str:
        """Which arm of how many this is."""
        name = self.run.path.name
        if name not in self.jobs:
            return name
        return f"arm {self.jobs.index(name) + 1} of {len(self.jobs)}: {self.labels[name]}"

    def seconds_left(self, done: int, total: int) -> float | None:
        """An estimate for this arm and all that follow; None before the first step."""
        if not done:
            return None
        elapsed = time.time() - self._began
        own = elapsed * (total - done) / done
        if self.run.path.name not in self.jobs:
            return own
        others = self._others
        each = others.seconds / others.done if others.done else elapsed * total / done
        return own + others.ahead * each

    def _look(self, trainer: pl.Trainer) -> None:
        """Once in a while: the loss, for which a GPU has to be waited for, and the files of the other arms."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        loss = trainer.callback_metrics.get("train/loss")
        self._loss = {} if loss is None else {"train": float(loss)}
        if self.run.path.name in self.jobs:
            states = {job: RunDirectory(self.run.path.parent / job).status() for job in self.jobs}
            finished = [status["seconds"] for status in states.values() if status.get("state") == "done"]
            later = self.jobs[self.jobs.index(self.run.path.name) + 1 :]
            ahead = sum(states[job].get("state") != "done" for job in later)
            self._others = Others(sum(finished), len(finished), ahead)

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        # One line for the arm: short validation passes would each leave another.
        return Tqdm(disable=True)

    def init_test_tqdm(self) -> Tqdm:
        bar = super().init_test_tqdm()
        bar.bar_format = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
        return bar

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        super().on_test_batch_start(trainer, pl_module, *args, **kwargs)
        assert isinstance(pl_module, LanguageModel)
        self.test_progress_bar.set_description(f"{self.arm()}, {pl_module.test_name} evaluation", refresh=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.time()
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(self.arm())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._look(trainer)
        if self.jobs:
            left = self.seconds_left(batch_idx + 1, int(trainer.num_training_batches))
            if left is not None:
                text = f"{self.arm()} (all: {int(left) // 60}:{int(left) % 60:02d} left)"
                self.train_progress_bar.set_description(text, refresh=False)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._train_progress_bar is not None:
            # What rang in the step that failed, which no batch end will show any more.
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        others = {name.replace("/loss", ""): value for name, value in metrics.items() if name != "v_num"}
        shown = {**self._loss, **others}
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        ringing = [name for callback in callbacks if isinstance(callback, Alarms) for name in callback.active]
        return {**shown, "ALARM": "+".join(ringing)} if ringing else shown


class ProgressFile(pl.Callback):
    """Writes how far a job is to ``progress.json``, about once a second, for the table of a sweep.

    ``phase`` training or evaluating, ``step``, ``max_steps``, ``loss`` (the last training loss) and ``seconds_left`` of
    the phase, each None as long as it is not known.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._began, self._first, self._written = 0.0, 0, -LOOK_SECONDS
        self._loss: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began, self._first = time.monotonic(), trainer.global_step
        self._write(trainer, "training", None)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._is_due():
            done, left = trainer.global_step - self._first, trainer.max_steps - trainer.global_step
            self._write(trainer, "training", self._left(done, left))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, "evaluating", None)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.monotonic()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._is_due():
            left = sum(map(int, trainer.num_test_batches)) - batch_idx - 1
            self._write(trainer, "evaluating", self._left(batch_idx + 1, left))

    def _is_due(self) -> bool:
        return time.monotonic() - self._written >= LOOK_SECONDS

    def _left(self, done: int, left: int) -> float | None:
        return (time.monotonic() - self._began) * left / done if done else None

    def _write(self, trainer: pl.Trainer, phase: str, seconds_left: float | None) -> None:
        self._written = time.monotonic()
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            self._loss = float(loss)  # a GPU is waited for here
        if trainer.is_global_zero:
            numbers = {"step": trainer.global_step, "max_steps": trainer.max_steps, "loss": self._loss}
            self.run.write_progress(phase=phase, seconds_left=seconds_left, **numbers)
