"""A trace of a few training steps, and the operators that took their time: ``debug=profile``."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers.pytorch import RegisterRecordFunction
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import profile, schedule, tensorboard_trace_handler

# Steps before the first one that is traced: the allocator, the solver and the profiler itself are slow at first.
SKIPPED, WARM_UP = 2, 1
TOP = 12
# Ranges that hold operators and are none: the step, the modules and the optimizer.
RANGES = ("ProfilerStep", "[pl]", "Optimizer.", "## ")


class StepProfile(pl.Callback):
    """Traces ``steps`` optimizer steps after the first three with torch's profiler; one file for each rank.

    The trace names modules and optimizer beside the operators. It opens in Perfetto and in TensorBoard's profiler.

    Args:
        folder: for ``rank_<r>.<time>.pt.trace.json.gz``.
        steps: optimizer steps, each with all its micro batches.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self._profiler: profile | None = None
        self._modules: RegisterRecordFunction | None = None
        self._top: list[FunctionEventAvg] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        write = tensorboard_trace_handler(str(self.folder), f"rank_{trainer.global_rank}", use_gzip=True)

        def on_trace_ready(profiler: profile) -> None:
            write(profiler)
            self._top = top_operators(profiler)

        plan = schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=self.steps, repeat=1)
        self._modules = RegisterRecordFunction(pl_module)
        self._modules.__enter__()
        self._profiler = profile(schedule=plan, on_trace_ready=on_trace_ready, record_shapes=True)
        self._profiler.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profiler is not None and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._profiler.step()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Here the progress bar has ended.
        if trainer.is_global_zero and self._top:
            print("\n".join(report(self._top, self.steps)))
            print(f"trace: {self.folder} (open it at https://ui.perfetto.dev, or in TensorBoard with its profiler)")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._profiler is not None and self._modules is not None:
            self._profiler.stop()
            self._modules.__exit__(None, None, None)
        self._profiler = self._modules = None


def top_operators(profiler: profile) -> list[FunctionEventAvg]:
    """The operators by their own time, on the GPU if there is one, the longest first."""
    operators = [event for event in profiler.key_averages() if not event.key.startswith(RANGES)]
    return sorted(operators, key=own_time, reverse=True)


def own_time(event: FunctionEventAvg) -> float:
    """Microseconds in an operator and in none that it calls."""
    return float(event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total)


def report(operators: list[FunctionEventAvg], steps: int) -> list[str]:
    """Lines of a table: own time, its share of all operators, calls and name of the first few."""
    total = sum(map(own_time, operators)) or 1.0
    rows = [
        f"{own / steps / 1000:10.3f}  {own / total:6.1%}  {event.count / steps:8.1f}  {event.key}"
        for event, own in ((event, own_time(event)) for event in operators[:TOP])
    ]
    return [f"operators by their own time, means over {steps} steps", "   ms/step   share     calls  operator", *rows]
