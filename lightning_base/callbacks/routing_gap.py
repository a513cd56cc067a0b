"""How differently a router routes in its other evaluation modes."""

from typing import Any

import pytorch_lightning as pl
import torch

from lightning_base.metrics.routing_gap import ExpertSets, expert_sets, tokens_that_differ
from lightning_base.module import LanguageModel


class RoutingGap(pl.Callback):
    """Compares the final passes over the validation text, one per evaluation mode of the router.

    ``final_<mode>_pass/routing_gap/<layer|mean>``: the share of all tokens, of all ranks, whose set of experts in that
    mode differs from the one in the default mode. Each pass runs the whole model in its mode: from the second sparse
    layer on, the router also sees other hidden states. Losses and loads of each pass are logged where those of the
    default mode are, under ``final_<mode>`` and ``final_<mode>_pass``.

    Attributes:
        results: all numbers logged, for the manifest.
    """

    def __init__(self) -> None:
        self.results: dict[str, float] = {}
        self._default: list[dict[str, ExpertSets]] = []
        self._differ: dict[str, int] = {}
        self._tokens = 0

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        if len(pl_module.evaluation_modes) == 1:
            return
        found = {layer: expert_sets(plan) for layer, plan in pl_module.plans.items()}
        if pl_module.test_name == "final":
            self._default.append(found)
            return
        # Batches come in the same order in every pass.
        for layer, sets in found.items():
            differ = tokens_that_differ(self._default[batch_idx][layer], sets)
            self._differ[layer] = self._differ.get(layer, 0) + differ
        self._tokens += next(iter(found.values())).num_tokens

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        if not self._differ:
            return
        counts = torch.tensor([self._tokens, *self._differ.values()], device=pl_module.device)
        tokens, *differ = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        gap = {layer: count / tokens for layer, count in zip(self._differ, differ, strict=True)}
        gap["mean"] = sum(gap.values()) / len(gap)
        values = {f"{pl_module.test_name}_pass/routing_gap/{layer}": share for layer, share in gap.items()}
        self._differ, self._tokens = {}, 0
        self.results.update(values)
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)
