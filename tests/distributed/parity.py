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
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import Strategy
from tiny_training import LENGTH, SEQUENCES, VOCABULARY, fit, language_model, leave, micro_batches
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_base.callbacks.expert_load import ExpertLoad
from lightning_base.distributed.expert_parallel import ExpertParallelStrategy
from lightning_base.distributed.gradients import gradient_norm
from lightning_base.module import LanguageModel

STEPS = 3
SHUFFLED = ", shuffled"
AMONG = 4  # sequences, which are two ranks' where four hold a step, or two hold half of it
CLIP = 0.3  # below the norm of every step


@dataclass(frozen=True)
class Layout:
    """How the work of a step is spread; ``expert_group`` and ``shared`` are those of ExpertParallelStrategy.

    ``recomputed`` is activation checkpointing.
    """

    ranks: int = 1
    accumulation: int = 1
    expert_group: int | None = None
    shared: str = "ddp"
    recomputed: bool = False

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
    "2 ranks, expert_parallel, accumulation, recomputed": Layout(2, 2, expert_group=2, recomputed=True),
    "2 ranks, expert_parallel with fsdp, recomputed": Layout(2, expert_group=2, shared="fsdp", recomputed=True),
    "4 ranks, expert_parallel 2 x 2": Layout(4, expert_group=2),
    "4 ranks, expert_parallel 2 x 2 with fsdp": Layout(4, expert_group=2, shared="fsdp"),
    "4 ranks, expert_parallel": Layout(4, expert_group=4),
}


class Norms(Logger):
    """Keeps the norm of every step; every rank has one."""

    name, version = "norms", 0

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.values += [value for name, value in metrics.items() if name == "train/gradient_norm"]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Record(pl.Callback):
    """Keeps what this rank has of every step: loss, plans, loads and gradients."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._plans: list[Any] = []
        self._loss = 0.0

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: LanguageModel, optimizer: Any) -> None:
        gradients = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        norm = float(gradient_norm(pl_module.parameters(), pl_module.held_with))
        self.steps.append({"gradients": held(pl_module, gradients), "norm": norm})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # A micro batch's loss over the number of micro batches is what Lightning hands on.
        self._loss += float(outputs["loss"]) / trainer.world_size
        self._plans.append(pl_module.plans)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        load = ExpertLoad(list(pl_module.plans), [plan.num_experts for plan in pl_module.plans.values()])
        for plans in self._plans:
            load.update(plans)
        metrics = load.compute()
        self.steps[-1] |= {
            "loss": self._loss,
            # How unequal ranks are depends on how many there are.
            "metrics": {name: float(value) for name, value in metrics.items() if "overload_factor" not in name},
            "passes": [
                {name: (p.token_index, p.expert_index, p.weight.double(), p.demand) for name, p in plans.items()}
                for plans in self._plans
            ],
        }
        self._plans, self._loss = [], 0.0


def held(module: LanguageModel, tensors: dict[str, Tensor]) -> dict[str, tuple[int | None, Tensor]]:
    """Whole tensors, and of experts what this rank holds, with the first that it holds."""
    first = {
        f"model.blocks.{layer}.feed_forward.experts.{name}": sparse.experts.held.start
        for layer, sparse in module.model.sparse_layers.items()
        for name, _ in sparse.experts.named_parameters()
    }
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    return {name: (first.get(name), tensor.detach().clone()) for name, tensor in whole.items()}


def train(router: str, layout: Layout, rank: int = 0) -> dict[str, Any]:
    """Trains a tiny model of two sparse layers on text without padding, with some, and with ranks that have only that.

    A loss is averaged over the routing groups of a pass, and passes then count alike: with one, no group may be empty.

    Args:
        router: its name, and perhaps ``SHUFFLED``.
        layout: of the ranks.
        rank: of this process.
    """
    module = language_model(
        router.removesuffix(SHUFFLED),
        max_steps=STEPS,
        depth=4,
        shuffle_tokens=AMONG if router.endswith(SHUFFLED) else False,
        activation_checkpointing=layout.recomputed,
    ).double()
    for layer in module.model.sparse_layers.values():
        layer.router.prepare(torch.arange(1, VOCABULARY + 1))
    # W2 starts at zero; then W1 has no gradient in the first step.
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if name.rpartition(".experts.")[2].startswith("w2"):
            parameter.data.normal_(std=0.1, generator=generator)
    record = Record()
    cut = {"world_size": layout.ranks, "accumulation": layout.accumulation}
    last = (2, 1) if module.loss_coefficients else (0, 0)
    lengths = [(LENGTH,) * SEQUENCES, (LENGTH, 3, 5, LENGTH, 1, 7, 2, 1), (LENGTH, 3, 5, LENGTH, 1, 7, *last)]
    batches = [b for step in range(STEPS) for b in micro_batches(step, rank=rank, lengths=lengths[step], **cut)]
    norms = Norms()
    fit(module, batches, record, **cut, strategy=layout.strategy(), gradient_clip_val=CLIP, logger=norms)
    return {
        "steps": [{**step, "norm": norm} for step, norm in zip(record.steps, norms.values, strict=True)],
        "weights": held(module, dict(module.named_parameters())),
        "buffers": {name: buffer.clone() for name, buffer in module.named_buffers()},
        "lengths": lengths,
        "expert_group": layout.expert_group or 1,
    }


@dataclass
class Training:
    """What all ranks together have seen and learnt; lists are by step.

    Args:
        decisions: layer, token of the global batch and expert of every assignment.
        gates: their weights, in the same order.
        counts: of each layer, what each expert was asked for.
    """

    losses: list[float]
    norms: list[float]
    decisions: list[list[tuple[str, int, int]]]
    gates: list[Tensor]
    counts: list[dict[str, list[int]]]
    metrics: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]


def joined(ranks: list[dict[str, Any]]) -> Training:
    """From what every rank has to what one rank would have."""
    by_step = list(zip(*(rank["steps"] for rank in ranks), strict=True))
    assignments = [in_order(steps, lengths) for steps, lengths in zip(by_step, ranks[0]["lengths"], strict=True)]
    metrics, group = [[step["metrics"] for step in steps] for steps in by_step], ranks[0]["expert_group"]
    assert all(one == of_step[0] for of_step in metrics for one in of_step), "the same on every rank"
    assert all(step["norm"] == steps[0]["norm"] for steps in by_step for step in steps), "the same on every rank"
    for rank in ranks:
        assert all(torch.equal(buffer, ranks[0]["buffers"][name]) for name, buffer in rank["buffers"].items())
    return Training(
        losses=[sum(step["loss"] for step in steps) for steps in by_step],
        norms=[steps[0]["norm"] for steps in by_step],
        decisions=[[key for key, _ in of_step] for of_step in assignments],
        gates=[torch.tensor([gate for _, gate in of_step], dtype=torch.float64) for of_step in assignments],
        counts=[
            {
                layer: sum(one[layer][3] for step in steps for one in step["passes"]).tolist()
                for layer in steps[0]["passes"][0]
            }
            for steps in by_step
        ],
        metrics={name: torch.tensor([of_step[0][name] for of_step in metrics]) for name in metrics[0][0]},
        gradients=[join_experts([step["gradients"] for step in steps], group) for steps in by_step],
        weights=join_experts([rank["weights"] for rank in ranks], group),
        buffers=ranks[0]["buffers"],
    )


def in_order(steps: list[dict[str, Any]], lengths: list[int]) -> list[tuple[tuple[str, int, int], float]]:
    """The assignments of one step of all ranks, by layer, token of the global batch, and expert.

    Micro batch a of rank r holds b sequences from (a W + r) b on, and a plan counts the tokens of its pass.
    """
    passes = [step["passes"][a] for a in range(len(steps[0]["passes"])) for step in steps]
    size, first, found = len(lengths) // len(passes), 0, []
    for i, plans in enumerate(passes):
        for layer, (token, expert, weight, _) in plans.items():
            rows = zip((token + first).tolist(), expert.tolist(), weight.tolist(), strict=True)
            found += [((layer, t, e), gate) for t, e, gate in rows]
        first += sum(lengths[i * size : (i + 1) * size])
    return sorted(found)


def join_experts(ranks: list[dict[str, tuple[int | None, Tensor]]], group: int) -> dict[str, Tensor]:
    """Whole tensors; what several ranks hold has to be the same on all of them, bit by bit."""
    result = {}
    for name, (first, mine) in ranks[0].items():
        by_first: dict[int, Tensor] = {}
        for rank in ranks:
            begin, tensor = rank[name]
            assert torch.equal(by_first.setdefault(begin or 0, tensor), tensor), name
        assert first is None or len(by_first) in (1, group)
        result[name] = torch.cat([by_first[begin] for begin in sorted(by_first)]) if first is not None else mine
    return result


def difference(one: Training, other: Training) -> dict[str, float]:
    """The largest difference of each kind, as a share of the largest number in what is compared."""

    def largest(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs if a.numel())

    def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        assert a.keys() == b.keys()
        return [(a[name].double(), b[name].double()) for name in a]

    return {
        "losses": largest([(torch.tensor(one.losses).double(), torch.tensor(other.losses).double())]),
        "norms": largest([(torch.tensor(one.norms).double(), torch.tensor(other.norms).double())]),
        "gates": largest(list(zip(one.gates, other.gates, strict=True))),
        "metrics": largest(same(one.metrics, other.metrics)),
        "gradients": max(largest(same(a, b)) for a, b in zip(one.gradients, other.gradients, strict=True)),
        "weights": largest(same(one.weights, other.weights)),
        "buffers": largest(same(one.buffers, other.buffers)),
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
