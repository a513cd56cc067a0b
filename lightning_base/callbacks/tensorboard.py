"""What TensorBoard shows of a run, and how it is arranged; how many tags there are depends on no depth and no E.

Scalars: of a figure that every sparse layer has, mean and max over layers; what is measured once, after training, is in
the text card ``result`` and the HParams table. Histograms and heatmaps: of the first, the middle and the last sparse
layer. All else is in metrics.csv and expert_load.csv. The custom scalars are laid out for comparing arms.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_base.program.run_directory import EVENTS

# Category, chart, and the scalar that it shows, with a line per run. If not said otherwise these are means over layers
# of what was asked for, in training of a routing group or a step, in validation of the whole pass.
LAYOUT = {
    "Loss": {
        "validation loss, nats per token": "validation/loss",
        "training loss, nats per token": "train/loss",
        "bits per byte": "validation/bits_per_byte",
    },
    "Balance": {
        "max_vio in training, by routing group": "train_group/max_vio/demand/mean",
        "max_vio in validation": "validation_pass/max_vio/demand/mean",
        "experts without a token, worst layer": "train_step/dead_experts/demand/max",
    },
    "Drop": {
        "dropped in training": "train_step/drop_rate/mean",
        "dropped in validation": "validation_pass/drop_rate/mean",
        "tokens left without an expert": "train_step/tokens_left_behind/mean",
    },
    "Throughput": {
        "tokens per second": "train/tokens_per_second",
        "seconds per step": "train/step_time",
        "1 - mean / fullest expert, worst layer": "train_step/idle_fraction_experts/max",
    },
}


class Board(TensorBoardLogger):
    """The TensorBoard logger of a run, which leaves out what would make the number of tags grow.

    Args:
        directory: the run directory; events go to its ``tensorboard/``.

    Attributes:
        is_new: whether nothing is there yet; a run that goes on has its cards and its arrangement.
    """

    def __init__(self, directory: Path) -> None:
        self.is_new = not any(directory.glob(EVENTS))
        super().__init__(directory, name="", version="tensorboard", default_hp_metric=False)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs the scalars that stand for all layers, and none of those that are measured after training."""
        shown = over_layers(metrics)
        super().log_metrics({name: value for name, value in shown.items() if not name.startswith("final")}, step)


class Arrangement(pl.Callback):
    """Lays out the custom scalars: a chart per question, in which TensorBoard overlays all runs."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        writer = tensorboard_writer(trainer, only_new=True)
        if writer is not None:
            writer.add_custom_scalars(
                {
                    title: {chart: ["Multiline", [f"^{tag}$"]] for chart, tag in by.items()}
                    for title, by in LAYOUT.items()
                }
            )


def over_layers(values: Mapping[str, float]) -> dict[str, float]:
    """The values without those of single layers: where ``<name>/mean`` is, of ``<name>/...`` mean and max alone."""
    return {
        name: value
        for name, value in values.items()
        if name.endswith(("/mean", "/max")) or f"{name.rpartition('/')[0]}/mean" not in values
    }


def shown_layers(layers: Sequence[str]) -> list[str]:
    """The first, the middle and the last."""
    return [layers[i] for i in sorted({0, len(layers) // 2, len(layers) - 1})]


def tensorboard_writer(trainer: pl.Trainer, *, only_new: bool = False) -> SummaryWriter | None:
    """The TensorBoard writer of this process, if it has one; with ``only_new`` that of a run which does not go on."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            if only_new and isinstance(logger, Board) and not logger.is_new:
                continue
            experiment = logger.experiment
            assert isinstance(experiment, SummaryWriter)
            return experiment
    return None


def card(values: Mapping[str, Any], prefix: str = "") -> str:
    """A table in Markdown with a row per value; the keys of nested mappings are joined with dots."""
    head = "" if prefix else "| | |\n| --- | --- |\n"
    rows = (
        card(value, f"{prefix}{key}.") if isinstance(value, Mapping) else f"| `{prefix}{key}` | {text(value)} |\n"
        for key, value in values.items()
    )
    return head + "".join(rows)


def text(value: Any) -> str:
    """A value in a cell of a table."""
    if value is None:
        return "–"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    return f"`{value}`".replace("|", "\\|")
