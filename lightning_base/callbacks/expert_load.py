"""Logs expert load: scalars, expert_load.csv, and in TensorBoard a histogram and a heatmap per layer.

Shapes: E experts, S logged steps.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_base.callbacks.metrics_csv import start_csv
from lightning_base.metrics.expert_load import ExpertLoad
from lightning_base.module import LanguageModel

COLUMNS = ("step", "stage", "layer", "expert", "demand", "load")


class ExpertLoadLogger(pl.Callback):
    """Measures load over single routing groups, over one optimizer step of all ranks, and over evaluation passes.

    Scalars are named ``<stage>_<scope>/<metric>/<demand|load>/<layer>``: ``train_step``, ``train_group``,
    ``validation_pass``, ``validation_group``, ``final_pass``, ... Counts go to ``expert_load.csv`` with their stage.

    Args:
        path: the CSV file.
        log_every_n_steps: optimizer steps between two records in training; the first step is recorded too.
        resumed_step: rows after this step are cut when a run resumes.
    """

    def __init__(self, path: Path, log_every_n_steps: int, resumed_step: int | None = None) -> None:
        self.log_every_n_steps = log_every_n_steps
        self.path, self.resumed_step = path, resumed_step
        self.totals = {"tokens": 0, "assignments": 0, "dropped": 0}
        self._history: dict[str, list[tuple[int, np.ndarray]]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, LanguageModel)
        layers = pl_module.model.sparse_layers
        first = next(iter(layers.values())).router
        self.metric = ExpertLoad(list(layers), first.num_experts).to(trainer.strategy.root_device)
        if trainer.is_global_zero and stage == "fit":
            start_csv(self.path, COLUMNS, self.resumed_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        parts = trainer.accumulate_grad_batches
        for plan in pl_module.plans.values():
            asked = int(plan.asked)
            self.totals["assignments"] += asked
            self.totals["dropped"] += asked - len(plan.token_index)
        self.totals["tokens"] += next(iter(pl_module.plans.values())).num_tokens
        # The step in progress, from the batch index: global_step moves only with the last micro batch.
        step = batch_idx // parts + 1
        if step % self.log_every_n_steps and step != 1:
            return
        self.metric.update(pl_module.plans)
        if (batch_idx + 1) % parts == 0:
            self._record(trainer, "train", "step", trainer.global_step)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        self.metric.update(pl_module.plans)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.on_validation_batch_end(*args, **kwargs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record(trainer, "validation", "pass", trainer.global_step)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        self._record(trainer, pl_module.test_name, "pass", trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        writer = tensorboard_writer(trainer)
        if writer is not None:
            for layer, history in self._history.items():
                writer.add_figure(f"expert_load_over_time/{layer}", load_heatmap(history), trainer.global_step)

    def _record(self, trainer: pl.Trainer, stage: str, scope: str, step: int) -> None:
        """Computes over all ranks, logs, writes the counts, and starts anew."""
        values = {}
        for name, value in self.metric.compute().items():
            kind, rest = name.split("/", 1)
            values[f"{stage}_{scope if kind == 'window' else 'group'}/{rest}"] = float(value)
        with self.metric.sync_context(should_sync=trainer.world_size > 1, should_unsync=True):
            demand, load = self.metric.demand.cpu(), self.metric.load.cpu()
        self.metric.reset()
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        self._write(step, f"{stage}_{scope}", demand, load)
        writer = tensorboard_writer(trainer)
        for i, layer in enumerate(self.metric.layers):
            if stage == "train":
                self._history.setdefault(layer, []).append((step, load[i].numpy()))
            if writer is not None:
                add_expert_histogram(writer, f"expert_load/{stage}_{scope}/{layer}", load[i], step)

    def _write(self, step: int, stage: str, demand: Tensor, load: Tensor) -> None:
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerows(
                (step, stage, layer, expert, int(demand[i, expert]), int(load[i, expert]))
                for i, layer in enumerate(self.metric.layers)
                for expert in range(demand.shape[1])
            )

    def state_dict(self) -> dict[str, Any]:
        # Of all ranks: Lightning builds checkpoints on every rank and keeps the first rank's.
        return {"totals": self.combined_totals()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        self.totals = {name: int(total) if first else 0 for name, total in state_dict["totals"].items()}

    def combined_totals(self) -> dict[str, int]:
        """Tokens, assignments and dropped assignments over all ranks; every rank has to ask."""
        parts: list[Any] = [self.totals]
        if dist.is_available() and dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self.totals)
        return {name: sum(part[name] for part in parts) for name in self.totals}


def tensorboard_writer(trainer: pl.Trainer) -> SummaryWriter | None:
    """The TensorBoard writer of this process, if it has one."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            experiment = logger.experiment
            assert isinstance(experiment, SummaryWriter)
            return experiment
    return None


def add_expert_histogram(writer: SummaryWriter, tag: str, load_E: Tensor, step: int) -> None:
    """A histogram with exactly one bin per expert: TensorBoard's own bins would blur neighbours."""
    counts = load_E.double()
    experts = torch.arange(len(counts), dtype=torch.float64)
    writer.add_histogram_raw(
        tag,
        min=0.0,
        max=float(len(counts)),
        num=int(counts.sum()),
        sum=float((counts * experts).sum()),
        sum_squares=float((counts * experts**2).sum()),
        bucket_limits=(experts + 1).tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def load_heatmap(history: list[tuple[int, np.ndarray]]) -> Any:
    """A matplotlib figure: experts over steps, colour is load relative to an even share."""
    from matplotlib.figure import Figure

    steps = [step for step, _ in history]
    load_ES = np.stack([load for _, load in history], 1).astype(float)
    relative_ES = load_ES / np.maximum(load_ES.mean(0), 1e-9)
    figure = Figure(figsize=(7, 0.25 * len(load_ES) + 1.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(relative_ES, aspect="auto", cmap="cividis", vmin=0, vmax=2, interpolation="nearest")
    shown = np.unique(np.linspace(0, len(steps) - 1, min(8, len(steps))).astype(int))
    axes.set_xticks(shown, [str(steps[i]) for i in shown])
    axes.set_xlabel("step")
    axes.set_ylabel("expert")
    figure.colorbar(image, label="load / even share")
    return figure
