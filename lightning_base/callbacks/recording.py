"""Records every routing plan of a run, to be replayed in another."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_base.module import LanguageModel
from lightning_base.program.run_directory import RunDirectory, write_json
from lightning_base.routing.plan import RoutingPlan
from lightning_base.routing.recording import (
    FOLDER,
    INDEX,
    GroupPlan,
    Pass,
    digest_groups,
    file_name,
    split_plan,
    write_pass,
)


class PlanRecorder(pl.Callback):
    """Writes the plans of each optimizer step and of each evaluation pass, one file per rank; see ``recording.py``.

    A step that is done again after a resume replaces its file. ``recording.json``, which says that all is there, comes
    with the final evaluation.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.folder = run.path / FOLDER
        self._pass: Pass = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._add(pl_module, batch)
        step, part = divmod(batch_idx, trainer.accumulate_grad_batches)
        if part == trainer.accumulate_grad_batches - 1:
            self._write(trainer, "train", step)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._add(pl_module, batch)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        self.on_validation_batch_end(trainer, pl_module, *args, **kwargs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, "validation", trainer.global_step)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        self._write(trainer, pl_module.test_name, trainer.global_step)
        trainer.strategy.barrier()  # every rank has written
        if trainer.is_global_zero:
            self._write_index(pl_module)

    def _add(self, pl_module: pl.LightningModule, batch: Mapping[str, Tensor]) -> None:
        assert isinstance(pl_module, LanguageModel)
        ids_T = batch["input_ids"][batch["valid"]]
        digests = digest_groups(ids_T, next(iter(pl_module.plans.values())).groups)
        for layer, plan in pl_module.plans.items():
            self._pass.setdefault(layer, {}).update(_held(plan, digests))

    def _write(self, trainer: pl.Trainer, stage: str, step: int) -> None:
        write_pass(self.folder / stage / file_name(step, trainer.global_rank, trainer.world_size), self._pass)
        self._pass = {}

    def _write_index(self, module: LanguageModel) -> None:
        layers = module.model.sparse_layers
        router = next(iter(layers.values())).router
        files = {str(path.relative_to(self.folder)): path.stat().st_size for path in self.folder.glob("*/step_*.npz")}
        facts = {
            "num_experts": router.num_experts,
            "top_k": router.top_k,
            "asks_for_fewer": router.asks_for_fewer,
            "causal": router.causal,
            "evaluation_modes": dict(router.evaluation_modes),
            "layers": list(layers),
        }
        write_json(self.folder / INDEX, {"router": facts, "files": dict(sorted(files.items()))})


def _held(plan: RoutingPlan, digests: list[bytes]) -> dict[bytes, GroupPlan]:
    """The groups that hold tokens, by the hash of these."""
    parts = zip(digests, split_plan(plan), plan.groups.sizes, strict=True)
    return {digest: part for digest, part, size in parts if size}
