"""How evenly the experts' computation is spread over experts and ranks.

Shapes: W ranks, P forward passes of one rank, N sparse layers, E experts.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_base.callbacks.metrics_csv import start_csv
from lightning_base.metrics.compute import batched_padding, capacity_padding, expert_flops, idle_fraction
from lightning_base.module import LanguageModel
from lightning_base.routing.plan import RoutingPlan

COLUMNS = ("step", "stage", "layer", "unit", "index", "tokens", "flops")


class ComputeBalance(pl.Callback):
    """Logs idle fractions and padding, and writes the tokens and FLOPs of every expert and every rank.

    Loads are after the drop: what is computed. Each name ends in ``/<layer|mean|max>``; ``train_step`` is one optimizer
    step of all ranks, ``final_pass`` and ``final_<mode>_pass`` are validation passes after training.

    ``<stage>/idle_fraction``: 1 - mean/max over ranks of the tokens that a rank's experts compute, in this run.
    ``<stage>/idle_fraction_experts``: the same over experts: what ranks would be idle if each held one expert.
    ``<stage>/capacity_padding``: share of empty slots in the buffers of experts with a capacity.
    ``train_micro_batch/batched_padding``, ``final_micro_batch/...``: share of the rows that would be padding if each
    forward pass of a rank gave every expert as many rows as its fullest one; summed over the passes of the stage.

    Rows of the file: ``step, stage, layer, unit, index, tokens, flops``, where a unit is an ``expert`` or a ``rank``,
    and FLOPs are those of the experts' matrix products, with the backward pass in training.

    Args:
        path: the CSV file.
        log_every_n_steps: optimizer steps between two records in training; the first step is recorded too.
        resumed_step: rows after this step are cut when a run resumes.

    Attributes:
        results: mean and max over layers of the final passes, for the manifest.
    """

    def __init__(self, path: Path, log_every_n_steps: int, resumed_step: int | None = None) -> None:
        self.path, self.log_every_n_steps, self.resumed_step = path, log_every_n_steps, resumed_step
        self.results: dict[str, float] = {}
        self._loads: list[Tensor] = []
        self._slots: list[Tensor] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and stage == "fit":
            start_csv(self.path, COLUMNS, self.resumed_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        parts = trainer.accumulate_grad_batches
        step = batch_idx // parts + 1
        if step % self.log_every_n_steps and step != 1:
            return
        self._add(pl_module.plans)
        if (batch_idx + 1) % parts == 0:
            self._record(trainer, pl_module, "train", "step")

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        assert isinstance(pl_module, LanguageModel)
        self._add(pl_module.plans)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        values = self._record(trainer, pl_module, pl_module.test_name, "pass")
        self.results.update({name: value for name, value in values.items() if name.endswith(("/mean", "/max"))})

    def _add(self, plans: Mapping[str, RoutingPlan]) -> None:
        """One forward pass."""
        self._loads.append(torch.stack([plan.load for plan in plans.values()]))
        slots = [self._loads[-1].new_zeros(()) if p.capacity is None else p.capacity.sum() for p in plans.values()]
        self._slots.append(torch.stack(slots))

    def _record(self, trainer: pl.Trainer, module: LanguageModel, stage: str, scope: str) -> dict[str, float]:
        """Gathers over ranks, logs, writes, and starts anew."""
        loads_PNE, slots_PN = torch.stack(self._loads), torch.stack(self._slots)
        self._loads, self._slots = [], []
        loads_WPNE = trainer.strategy.all_gather(loads_PNE).reshape(-1, *loads_PNE.shape).cpu()
        slots_WPN = trainer.strategy.all_gather(slots_PN).reshape(-1, *slots_PN.shape).cpu()
        layers = module.model.sparse_layers
        exchange = next(iter(layers.values())).exchange
        group = 1 if exchange is None else exchange.size
        values = {}
        for name, found_N in balance(loads_WPNE, slots_WPN, stage, scope, group).items():
            by_layer = dict(zip(layers, found_N.tolist(), strict=True))
            by_layer |= {"mean": float(found_N.mean()), "max": float(found_N.max())}
            values.update({f"{name}/{layer}": value for layer, value in by_layer.items()})
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)
            self._write(trainer.global_step, f"{stage}_{scope}", module, loads_WPNE, group)
        return values

    def _write(self, step: int, stage: str, module: LanguageModel, loads_WPNE: Tensor, group: int) -> None:
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            for i, (name, layer) in enumerate(module.model.sparse_layers.items()):
                by_unit = {"expert": loads_WPNE[:, :, i].sum((0, 1)), "rank": computed_by_rank(loads_WPNE, group)[i]}
                entries = sum(parameter[0].numel() for parameter in layer.experts.parameters() if parameter.ndim == 3)
                for unit, tokens in by_unit.items():
                    flops = expert_flops(tokens, entries=entries, training=stage == "train_step")
                    counts = zip(tokens.tolist(), flops.tolist(), strict=True)
                    writer.writerows((step, stage, name, unit, n, t, int(f)) for n, (t, f) in enumerate(counts))


def computed_by_rank(loads_WPNE: Tensor, group: int) -> Tensor:
    """Tokens that each rank's experts compute, [N, W].

    Args:
        loads_WPNE: [W, P, N, E], by the rank that holds the tokens.
        group: consecutive ranks that share the experts, in equal runs; with 1, each computes its own tokens.
    """
    loads_WNE = loads_WPNE.sum(1)
    # Of each group of ranks, the tokens of all for each one's experts.
    by_group = loads_WNE.unflatten(0, (-1, group)).sum(1).unflatten(-1, (group, -1)).sum(-1)
    return by_group.transpose(1, 2).flatten(0, 1).T


def balance(loads_WPNE: Tensor, slots_WPN: Tensor, stage: str, scope: str, group: int = 1) -> dict[str, Tensor]:
    """The measures of every layer, [N] each, by name.

    Args:
        loads_WPNE: [W, P, N, E], tokens of each expert.
        slots_WPN: [W, P, N], slots of one expert; 0 where there is no capacity.
        stage: ``train``, ``final``, ``final_<mode>``.
        scope: ``step`` or ``pass``.
        group: see ``computed_by_rank``.
    """
    loads_NGE = loads_WPNE.flatten(0, 1).transpose(0, 1)
    slots_NG = slots_WPN.flatten(0, 1).T
    found = {
        f"{stage}_{scope}/idle_fraction": idle_fraction(computed_by_rank(loads_WPNE, group)),
        f"{stage}_{scope}/idle_fraction_experts": idle_fraction(loads_NGE.sum(1)),
        f"{stage}_micro_batch/batched_padding": batched_padding(loads_NGE),
    }
    if bool((slots_NG > 0).any()):
        found[f"{stage}_{scope}/capacity_padding"] = capacity_padding(loads_NGE, slots_NG)
    return found
