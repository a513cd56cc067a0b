"""How often the same tokens change their experts while a router learns."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_base.callbacks.causality import router_inputs
from lightning_base.distributed.reduction import over_ranks, rank, world_size
from lightning_base.metrics.routing_gap import ExpertSets, expert_sets, tokens_that_differ
from lightning_base.module import LanguageModel

Sets = dict[str, ExpertSets]


class RoutingChange(pl.Callback):
    """Routes one batch of validation text again and again, as in training, and counts the tokens that move.

    ``routing_change/<step|validation>/<layer|mean>``: the share of the tokens, of all ranks, whose set of experts is
    another one after one optimizer step, and since the validation before. The batch is the first of each rank. Hidden
    states are those of evaluation. Each layer's router routes as it does in training and learns nothing from it: what
    it remembers changes at the end of a step alone. A router that knows no other text (``any_text``) is left out.
    """

    def __init__(self) -> None:
        self._probe: Mapping[str, Tensor] | None = None
        self._last: Sets = {}
        self._step_follows = False

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
        if batch_idx or not all(layer.router.any_text for layer in pl_module.model.sparse_layers.values()):
            return
        self._probe = batch
        found = self._route(trainer, pl_module)
        if sizes(self._last) == sizes(found):
            self._log(trainer, pl_module, "validation", found)
        self._last, self._step_follows = found, True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        if self._step_follows and self._probe is not None and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._step_follows = False
            self._log(trainer, pl_module, "step", self._route(trainer, pl_module))
            self._probe = None

    def _route(self, trainer: pl.Trainer, module: LanguageModel) -> Sets:
        assert self._probe is not None
        training = module.model.training
        module.model.eval()
        with trainer.precision_plugin.forward_context():
            inputs = router_inputs(module, self._probe)
        module.model.train(training)
        found = {}
        for layer, given in inputs.items():
            router = module.model.sparse_layers[layer].router
            with torch.no_grad():
                found[layer] = expert_sets(router.train()(*given))
            router.train(training)
        return found

    def _log(self, trainer: pl.Trainer, module: LanguageModel, over: str, found: Sets) -> None:
        moved = [tokens_that_differ(self._last[layer], sets) for layer, sets in found.items()]
        counts = torch.tensor([next(iter(found.values())).num_tokens, *moved], device=module.device)
        tokens, *moved = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        values = {f"routing_change/{over}/{layer}": n / tokens for layer, n in zip(found, moved, strict=True)}
        values[f"routing_change/{over}/mean"] = sum(moved) / tokens / len(moved)
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        # Of all ranks, each of which has a batch of its own: a checkpoint keeps what the first one gives.
        mine = {layer: [sets.pairs, sets.num_tokens, sets.num_experts] for layer, sets in self._last.items()}
        return {"last": over_ranks(mine)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # With other ranks or another accumulation batches are others, and the next validation has nothing to compare.
        last = state_dict["last"]
        if len(last) == world_size():
            self._last = {layer: ExpertSets(*held) for layer, held in last[rank()].items()}


def sizes(found: Sets) -> dict[str, int]:
    """The tokens that were routed in each layer."""
    return {layer: sets.num_tokens for layer, sets in found.items()}
