"""How far a router leaks later tokens to earlier ones, and where in a routing group tokens are dropped.

Shapes: T tokens, N bins.
"""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_base.callbacks.metrics_csv import start_csv
from lightning_base.metrics.causality import causal_leak, drops_by_position
from lightning_base.module import LanguageModel, valid_or_none
from lightning_base.routing.plan import RoutingGroups, RoutingPlan

RouterInput = tuple[Tensor, Tensor, RoutingGroups]
WAYS = ("expert", "weight", "drop", "any")
COLUMNS = ("step", "stage", "layer", "bin", "asked", "dropped")


class CausalityMonitor(pl.Callback):
    """Measures the causal leak of every sparse layer's router after training, on the first batches of the final pass.

    ``final_causality/leak_<training|evaluation>_<expert|weight|drop|any>/<layer|mean|max>``: the share of the tokens in
    the first half of their routing group whose expert, gate or drop (or any of them) changes when the second half is
    replaced by that of another batch. The layer's real router input is used as it is, so that a layer's number is its
    own leak only. Over the tokens of all ranks. Nothing is measured of a router that knows no other text
    (``any_text``).

    Args:
        batches: validation batches per rank to measure on.

    Attributes:
        results: mean and max over layers, for the manifest.
    """

    def __init__(self, batches: int = 2) -> None:
        self.batches = batches
        self.results: dict[str, float] = {}
        self._inputs: dict[str, list[RouterInput]] = {}

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
        if batch_idx >= self.batches or pl_module.test_name != "final":
            return
        if not all(layer.router.any_text for layer in pl_module.model.sparse_layers.values()):
            return
        with trainer.precision_plugin.forward_context():
            found = router_inputs(pl_module, batch)
        for layer, router_input in found.items():
            self._inputs.setdefault(layer, []).append(router_input)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        if not self._inputs:
            return
        shares: dict[str, dict[str, float]] = {}
        for layer, inputs in self._inputs.items():
            router = pl_module.model.sparse_layers[layer].router
            for training in (True, False):
                counts = torch.zeros(len(WAYS) + 1, dtype=torch.int64, device=pl_module.device)
                for own, other in zip(inputs, [*inputs[1:], inputs[0]], strict=True):
                    found = causal_leak(router, *own[:2], *other_text(own, other), own[2], training=training)
                    counts += torch.tensor([found[way] for way in (*WAYS, "tokens")], device=counts.device)
                *changed, tokens = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
                for way, count in zip(WAYS, changed, strict=True):
                    name = f"final_causality/leak_{'training' if training else 'evaluation'}_{way}"
                    # Groups of a single token have no earlier tokens to hear anything.
                    shares.setdefault(name, {})[layer] = count / tokens if tokens else 0.0
        self._inputs = {}
        values: dict[str, float] = {}
        for name, by_layer in shares.items():
            summary = {"mean": sum(by_layer.values()) / len(by_layer), "max": max(by_layer.values())}
            values.update({f"{name}/{layer}": share for layer, share in {**by_layer, **summary}.items()})
            self.results.update({f"{name}/{key}": share for key, share in summary.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)


def router_inputs(module: LanguageModel, batch: Mapping[str, Tensor]) -> dict[str, RouterInput]:
    """What each sparse layer's router is given in a forward pass of its own, which is not compiled: hooks run."""
    found: dict[str, RouterInput] = {}

    def keep(layer: str, given: tuple[Any, ...]) -> None:
        tokens_TD, ids_T, groups = given
        found[layer] = (tokens_TD.detach(), ids_T, groups)

    hooks = [
        sparse.router.register_forward_pre_hook(lambda _module, given, layer=layer: keep(layer, given))
        for layer, sparse in module.model.sparse_layers.items()
    ]
    document = None if module.attend_across_documents else batch["document"]
    try:
        with torch.no_grad():
            module.model(batch["input_ids"], valid_or_none(batch), document)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def other_text(own: RouterInput, other: RouterInput) -> tuple[Tensor, Tensor]:
    """Tokens and ids to replace one's own with: each group's from the same group of another batch.

    Group by group, so that it does not matter how groups are spread over ranks. A shorter group is taken all round;
    where the other is empty, or is the same batch, the group's own text read backwards will do.
    """
    (tokens_TD, ids_T, groups), (other_TD, other_ids_T, other_groups) = own, other
    tokens, ids = [tokens_TD[:0]], [ids_T[:0]]
    places = zip(groups.starts(), groups.sizes, other_groups.starts(), other_groups.sizes, strict=True)
    for start, size, other_start, other_size in places:
        if other_size and other_ids_T is not ids_T:
            index = other_start + torch.arange(size, device=ids_T.device) % other_size
            tokens.append(other_TD[index])
            ids.append(other_ids_T[index])
        else:
            tokens.append(tokens_TD[start : start + size].flip(0))
            ids.append(ids_T[start : start + size].flip(0))
    return torch.cat(tokens), torch.cat(ids)


class DropByPosition(pl.Callback):
    """Writes how often tokens are dropped by their place in the routing group, where a capacity lets position tell.

    Rows of ``step, stage, layer, bin, asked, dropped`` over all ranks: stage ``train_step`` is one optimizer step,
    ``final_pass`` and ``final_<mode>_pass`` are whole validation passes after training. A replay of a router whose
    tokens may ask for fewer than k experts has no rows: its recording does not say which tokens did.

    Args:
        path: the CSV file.
        log_every_n_steps: optimizer steps between two records in training; the first step is recorded too.
        resumed_step: rows after this step are cut when a run resumes.
        bins: N, equal parts of a routing group.
    """

    def __init__(self, path: Path, log_every_n_steps: int, resumed_step: int | None = None, bins: int = 16) -> None:
        self.path, self.log_every_n_steps, self.resumed_step, self.bins = path, log_every_n_steps, resumed_step, bins
        self._counts: dict[str, Tensor] = {}

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
            self._write(trainer, "train_step")

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        assert isinstance(pl_module, LanguageModel)
        self._add(pl_module.plans)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        self._write(trainer, f"{pl_module.test_name}_pass")

    def _add(self, plans: Mapping[str, RoutingPlan]) -> None:
        for layer, plan in plans.items():
            found = drops_by_position(plan, self.bins)
            # NaN outlives every sum, over passes and over ranks: what one of them cannot say, no row says.
            counts = torch.full((2, self.bins), torch.nan, dtype=torch.float64, device=plan.token_index.device)
            counts = counts if found is None else torch.stack(found).double()
            self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts

    def _write(self, trainer: pl.Trainer, stage: str) -> None:
        """Sums over ranks, writes, and starts anew."""
        layers, counts = list(self._counts), torch.stack(list(self._counts.values()))
        self._counts = {}
        summed = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if not trainer.is_global_zero:
            return
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerows(
                (trainer.global_step, stage, layer, n, int(asked), int(dropped))
                for layer, sides in zip(layers, summed, strict=True)
                for n, (asked, dropped) in enumerate(zip(*sides, strict=True))
                if not math.isnan(asked)
            )
