"""Logs expert load: scalars, expert_load.csv, and in TensorBoard histograms and heatmaps.

Shapes: N sparse layers, E experts, S logged steps.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_base.callbacks.metrics_csv import start_csv
from lightning_base.callbacks.tensorboard import over_layers, shown_layers, tensorboard_writer
from lightning_base.distributed.reduction import over_ranks, rank
from lightning_base.drop_in import drop_ins
from lightning_base.metrics.expert_load import ExpertLoad
from lightning_base.routing.plan import RoutingPlan

COLUMNS = ("step", "stage", "layer", "expert", "demand", "load")
BY_LAYER = "max_vio_over_time"


class ExpertLoadLogger(pl.Callback):
    """Measures load over single routing groups, over one optimizer step of all ranks, and over evaluation passes.

    Works in any LightningModule with ``DropIn`` layers, or with an attribute ``plans`` that holds the detached plans of
    the last forward pass by the name of their layer. Of several forward passes in a batch it sees the last.

    Scalars go to all loggers and are named ``<stage>_<scope>/<metric>/<demand|load>/<layer>``: ``train_step``,
    ``train_group``, ``validation_pass``, ``validation_group``, ``test_pass``, ... A module's ``test_name`` stands for
    ``test``, if it has one. Of the layers TensorBoard gets ``mean`` and ``max`` alone, histograms of the load and
    heatmaps of it over training of the first, the middle and the last, and a heatmap of ``max_vio`` in all.

    Args:
        path: a CSV file for the counts of every expert; None writes none.
        log_every_n_steps: optimizer steps between two records in training; the first step is recorded too.
        resumed_step: rows after this step are cut when a run resumes.
    """

    def __init__(
        self, path: str | Path | None = None, log_every_n_steps: int = 50, resumed_step: int | None = None
    ) -> None:
        self.log_every_n_steps = log_every_n_steps
        self.path, self.resumed_step = None if path is None else Path(path), resumed_step
        self.totals = {"tokens": 0, "assignments": 0, "dropped": 0}
        self._asked: Tensor | None = None
        self._kept = 0
        # By stage: validation may come between two micro batches of a step.
        self.metrics: dict[str, ExpertLoad] = {}
        self._steps_before = 0
        # Columns of the heatmaps by their tag, and the layers that one of them shows.
        self._layers: list[str] = []
        self._history: dict[str, list[tuple[int, np.ndarray]]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.path is not None and trainer.is_global_zero and stage == "fit":
            start_csv(self.path, COLUMNS, self.resumed_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._steps_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        plans = plans_of(pl_module)
        for plan in plans.values():
            self._asked = plan.asked if self._asked is None else self._asked + plan.asked
            self._kept += len(plan.token_index)
        self.totals["tokens"] += next(iter(plans.values())).num_tokens
        # The step in progress: global_step moves only with the last micro batch.
        step = self._steps_before + 1
        if step % self.log_every_n_steps and step != 1:
            return
        self._update(trainer, "train", plans)
        if trainer.global_step > self._steps_before:
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
        if not trainer.sanity_checking:
            self._update(trainer, "validation", plans_of(pl_module))

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        self._update(trainer, name_of_test(pl_module), plans_of(pl_module))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._record(trainer, "validation", "pass", trainer.global_step)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record(trainer, name_of_test(pl_module), "pass", trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run that goes on after its last step trains no more, and has no end of training.
        writer = tensorboard_writer(trainer)
        if writer is not None:
            for tag, history in self._history.items():
                figure = heatmap(history, self._layers if tag == BY_LAYER else None)
                writer.add_figure(tag, figure, trainer.global_step)

    def _update(self, trainer: pl.Trainer, stage: str, plans: dict[str, RoutingPlan]) -> None:
        if stage not in self.metrics or self.metrics[stage].layers != list(plans):
            experts = [plan.num_experts for plan in plans.values()]
            self.metrics[stage] = ExpertLoad(list(plans), experts).to(trainer.strategy.root_device)
        self.metrics[stage].update(plans)

    def _record(self, trainer: pl.Trainer, stage: str, scope: str, step: int) -> None:
        """Computes over all ranks, logs, writes the counts, and starts anew."""
        metric = self.metrics.get(stage)
        if metric is None:
            return
        values = {}
        for name, value in metric.compute().items():
            kind, rest = name.split("/", 1)
            values[f"{stage}_{scope if kind == 'window' else 'group'}/{rest}"] = float(value)
        with metric.sync_context(should_sync=trainer.world_size > 1, should_unsync=True):
            demand, load = metric.demand.cpu(), metric.load.cpu()
        metric.reset()
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics(over_layers(values) if isinstance(logger, TensorBoardLogger) else values, step)
        self._write(metric, step, f"{stage}_{scope}", demand, load)
        writer = tensorboard_writer(trainer)
        if writer is None:
            return
        for layer in shown_layers(metric.layers):
            i = metric.layers.index(layer)
            load_E = load[i, : metric.num_experts[i]]
            add_expert_histogram(writer, f"expert_load/{stage}_{scope}/{layer}", load_E, step)
            if stage == "train":
                even = max(float(load_E.double().mean()), 1e-9)
                self._history.setdefault(f"expert_load_over_time/{layer}", []).append((step, load_E.numpy() / even))
        if stage == "train":
            vio_N = np.array([values[f"train_step/max_vio/demand/{layer}"] for layer in metric.layers])
            self._layers = metric.layers
            self._history.setdefault(BY_LAYER, []).append((step, vio_N))

    def _write(self, metric: ExpertLoad, step: int, stage: str, demand: Tensor, load: Tensor) -> None:
        if self.path is None:
            return
        if not self.path.exists():
            start_csv(self.path, COLUMNS, None)
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerows(
                (step, stage, layer, expert, int(demand[i, expert]), int(load[i, expert]))
                for i, layer in enumerate(metric.layers)
                for expert in range(metric.num_experts[i])
            )

    def state_dict(self) -> dict[str, Any]:
        # Of all ranks: Lightning builds checkpoints on every rank and keeps the first rank's.
        # One tensor for each heatmap: a tensor per step would be as many parts of a file.
        history = {
            tag: ([step for step, _ in columns], torch.from_numpy(np.stack([column for _, column in columns])))
            for tag, columns in self._history.items()
        }
        return {"totals": self.combined_totals(), "layers": self._layers, "history": history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.totals = {name: 0 if rank() else int(total) for name, total in state_dict["totals"].items()}
        # Checkpoints from before these were kept have none.
        self._layers = state_dict.get("layers", [])
        self._history = {
            tag: list(zip(steps, columns.numpy().copy(), strict=True))
            for tag, (steps, columns) in state_dict.get("history", {}).items()
        }

    def combined_totals(self) -> dict[str, int]:
        """Tokens, assignments and dropped assignments over all ranks; every rank has to ask."""
        if self._asked is not None:
            # Added up where the plans are: to ask in every step would make the host wait for a GPU.
            asked, self._asked = int(self._asked), None
            self.totals["assignments"] += asked
            self.totals["dropped"] += asked - self._kept
            self._kept = 0
        parts = over_ranks(self.totals)
        return {name: sum(part[name] for part in parts) for name in self.totals}


def name_of_test(module: pl.LightningModule) -> str:
    """What the figures of a test pass are called."""
    return str(getattr(module, "test_name", "test"))


def plans_of(module: pl.LightningModule) -> dict[str, RoutingPlan]:
    """The plans of the last forward pass by the name of their layer.

    Raises:
        ValueError: there are none.
    """
    kept = getattr(module, "plans", None)
    if kept:
        return dict(kept)
    plans = {name: drop_in.plan for name, drop_in in drop_ins(module).items() if drop_in.plan is not None}
    if not plans:
        raise ValueError(
            f"ExpertLoadLogger found no routing plan in {type(module).__name__}: put its sparse layers into DropIn, or "
            "keep the plans of a forward pass in an attribute plans, by the name of the layer"
        )
    return plans


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


def heatmap(history: list[tuple[int, np.ndarray]], layers: list[str] | None) -> Any:
    """A matplotlib figure over steps: the max_vio of the layers, or of experts the load relative to an even share."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [step for step, _ in history]
    values = np.stack([column for _, column in history], 1)
    figure = Figure(figsize=(7, min(0.25 * len(values) + 1.2, 9)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=max(1.0, values.max()) if layers else 2)
    shown = np.unique(np.linspace(0, len(steps) - 1, min(8, len(steps))).astype(int))
    axes.set_xticks(shown, [str(steps[i]) for i in shown])
    axes.set_xlabel("step")
    if layers:
        axes.set_yticks(range(len(layers)), layers)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_ylabel("expert")
    figure.colorbar(image, label="max_vio" if layers else "load / even share")
    return figure
