"""The same training in every layout of ranks, in double precision: what each rank has seen and learnt.

Called in one process, or run on several by torchrun: ``python parity.py FOLDER ROUTERS LAYOUTS``, both joined by |,
writes what each rank found.
"""

import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import Strategy
from tiny_training import LENGTH, SEQUENCES, VOCABULARY, fit, language_model, leave, micro_batches
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_base.callbacks.expert_load import ExpertLoad
from lightning_base.distributed.expert_parallel import ExpertParallelStrategy
from lightning_base.module import LanguageModel

STEPS = 3
CLIP = 0.3  # below the norm of every step


@dataclass(frozen=True)
class Layout:
    """How the work of a step is spread; ``expert_group`` and ``shared`` are those of ExpertParallelStrategy."""

    ranks: int = 1
    accumulation: int = 1
    expert_group: int | None = None
    shared: str = "ddp"

    def strategy(self) -> Strategy | None:
        if self.expert_group is None:
            return None
        return ExpertParallelStrategy(
            expert_group=self.expert_group, shared=self.shared, process_group_backend="gloo", same_sizes=False
        )


LAYOUTS = {
    "one rank": Layout(),
    "accumulation": Layout(accumulation=2),
    "2 ranks, ddp": Layout(2),
    "2 ranks, expert_parallel": Layout(2, expert_group=2),
    "2 ranks, fsdp": Layout(2, expert_group=1, shared="fsdp"),
    "2 ranks, expert_parallel with fsdp": Layout(2, expert_group=2, shared="fsdp"),
    "2 ranks, expert_parallel, accumulation": Layout(2, 2, expert_group=2),
    "4 ranks, expert_parallel 2 x 2": Layout(4, expert_group=2),
    "4 ranks, expert_parallel 2 x 2 with fsdp": Layout(4, expert_group=2, shared="fsdp"),
    "4 ranks, expert_parallel": Layout(4, expert_group=4),
}


class Record(pl.Callback):
    """Keeps, of every step: loss, plans, loads, gradients and their norm."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._plans: list[Any] = []
        self._losses = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # What Lightning hands on is the loss of the micro batch divided by their number.
        self._losses += float(outputs["loss"]) / trainer.world_size
        self._plans.append(pl_module.plans)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        load = ExpertLoad(list(pl_module.plans), [plan.num_experts for plan in pl_module.plans.values()])
        for plans in self._plans:
            load.update(plans)
        metrics = {name: float(value) for name, value in load.compute().items() if "overload" not in name}
        self.steps[-1].update(
            loss=self._losses,
            norm=float(trainer.callback_metrics["train/gradient_norm"]),
            metrics=metrics,
            plans=[
                {name: (plan.token_index, plan.expert_index, plan.weight.double()) for name, plan in plans.items()}
                for plans in self._plans
            ],
        )
        self._plans, self._losses = [], 0.0

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: LanguageModel, optimizer: Any) -> None:
        gradients = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        self.steps.append({"gradients": values(pl_module, gradients)})


def values(module: LanguageModel, tensors: dict[str, Tensor]) -> dict[str, tuple[int, Tensor]]:
    """Whole tensors, or what this rank holds of those of experts, with the expert that it begins with."""
    first = {
        f"model.blocks.{layer}.feed_forward.experts.{name}": sparse.experts.held.start
        for layer, sparse in module.model.sparse_layers.items()
        for name, _ in sparse.experts.named_parameters()
    }
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    return {name: (first.get(name, 0), tensor.detach().clone()) for name, tensor in whole.items()}


def train(router: str, layout: Layout, rank: int = 0, **options: Any) -> dict[str, Any]:
    """Trains a tiny model of two sparse layers on text without padding, with some, and with ranks that have nothing else.

    A loss is averaged over the routing groups of a pass, and passes then count alike: with one, no group may be empty.
    """
    module = language_model(router, max_steps=STEPS, depth=4, **options).double()
    for layer in module.model.sparse_layers.values():
        layer.router.prepare(torch.arange(1, VOCABULARY + 1))
    record = Record()
    cut = {"world_size": layout.ranks, "accumulation": layout.accumulation}
    last = (2, 1) if module.loss_coefficients else (0, 0)
    lengths = [(LENGTH,) * SEQUENCES, (LENGTH, 3, 5, LENGTH, 1, 7, 2, 1), (LENGTH, 3, 5, LENGTH, 1, 7, *last)]
    batches = [b for step in range(STEPS) for b in micro_batches(step, rank=rank, lengths=lengths[step], **cut)]
    fit(module, batches, record, **cut, strategy=layout.strategy(), gradient_clip_val=CLIP)
    return {
        "steps": record.steps,
        "weights": values(module, dict(module.named_parameters())),
        "buffers": {n: b.clone() for n, b in module.named_buffers()},
        "tokens_per_chunk": SEQUENCES * LENGTH // (layout.ranks * layout.accumulation),
    }


def main(folder: Path, routers: str, layouts: str) -> None:
    """One of several ranks."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = {
        (layout, router): train(router, LAYOUTS[layout], rank)
        for layout in layouts.split("|")
        for router in routers.split("|")
    }
    torch.save(found, folder / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
