"""How long training took, how fast it goes and what memory it needs."""

import time
from typing import Any

import psutil
import pytorch_lightning as pl
import torch


class TrainingClock(pl.Callback):
    """Counts seconds spent in training steps, validation and checkpoints excluded, and logs throughput.

    ``train/step_time`` [s] is the mean and ``train/tokens_per_second`` [1/s, all ranks] the total over the time of the
    steps since the last log, whatever the logging interval. ``train/memory_mb`` is the peak of this process so far:
    device memory on a GPU, resident memory on a CPU.

    Attributes:
        taken: seconds of the last batch.
    """

    def __init__(self, log_every_n_steps: int) -> None:
        self.log_every_n_steps = log_every_n_steps
        self.seconds = self.taken = 0.0
        self._started: float | None = None
        self._window_seconds, self._window_tokens, self._window_steps = 0.0, 0, 0
        self._peak = 0.0
        self._step = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = time.perf_counter()
        self._step = trainer.global_step + 1
        if self._logs(self._step) and pl_module.device.type == "cuda":
            # What is left of the steps before: a logged step is measured by itself.
            torch.cuda.synchronize(pl_module.device)
            left, self._started = time.perf_counter() - self._started, time.perf_counter()
            self.seconds += left
            self._window_seconds += left

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        assert self._started is not None
        if self._logs(self._step) and pl_module.device.type == "cuda":
            # Around logged steps only: the host stands still meanwhile.
            torch.cuda.synchronize(pl_module.device)
        self.taken = time.perf_counter() - self._started
        self.seconds += self.taken
        self._window_seconds += self.taken
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._window_tokens += batch["targets_of_step"]
        self._window_steps += 1
        step = trainer.global_step
        if not self._logs(step):
            return
        values = {
            "train/step_time": self._window_seconds / self._window_steps,
            "train/tokens_per_second": self._window_tokens / self._window_seconds,
            "train/memory_mb": self._memory(pl_module.device),
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        self._window_seconds, self._window_tokens, self._window_steps = 0.0, 0, 0

    def _logs(self, step: int) -> bool:
        return step % self.log_every_n_steps == 0 or step == 1

    def _memory(self, device: torch.device) -> float:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 2**20
        self._peak = max(self._peak, psutil.Process().memory_info().rss / 2**20)
        return self._peak

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = float(state_dict["seconds"])
