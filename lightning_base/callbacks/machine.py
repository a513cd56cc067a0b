"""How fast the machine itself is while a run trains: others on it slow one arm of a sweep and not the next."""

import time
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_base.callbacks.clock import TrainingClock

# About 5 ms of one core, less of a GPU; small enough for the caches.
SIZES = {"cpu": (256, 24), "cuda": (1024, 64)}
# Of the training time, at most.
SHARE = 0.005


class MachineMonitor(pl.Callback):
    """Times a fixed piece of work after logged steps: ``machine/reference_ms``, milliseconds, of the first rank.

    The work, a chain of equal matrix products on the device of the run, is the same for every arm; what changes is the
    machine. It stands outside the training clock, and is left out where it would cost more than a share of the
    training time so far.

    Args:
        log_every_n_steps: optimizer steps between two timings; the first step has one too.
        clock: knows the training time; it comes earlier in the list of callbacks.
    """

    def __init__(self, log_every_n_steps: int, clock: TrainingClock) -> None:
        self.log_every_n_steps, self.clock = log_every_n_steps, clock
        self._spent = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # What the first product of a process costs more is no news of the machine.
        work(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = step % self.log_every_n_steps == 0 or step == 1
        if not (whole and due) or self._spent > SHARE * self.clock.seconds:
            return
        seconds = work(pl_module.device)
        self._spent += seconds
        for logger in trainer.loggers:
            logger.log_metrics({"machine/reference_ms": 1e3 * seconds}, step)


@torch.no_grad()
def work(device: torch.device) -> float:
    """Seconds of the chain of matrix products, from an idle device to an idle device."""
    size, repeats = SIZES["cuda" if device.type == "cuda" else "cpu"]
    # Powers of a matrix with rows that add up to 1 neither grow nor vanish.
    matrix = torch.full((size, size), 1 / size, device=device)
    product = matrix.clone()
    wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        product = matrix @ product
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
