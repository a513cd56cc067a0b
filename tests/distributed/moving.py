"""Training that is saved in one layout of ranks and goes on in another: what each rank holds before and after.

``python moving.py FOLDER SAVES LOADS``, alone or on several ranks by torchrun. SAVES are layouts of as many ranks,
to save in and to load in; LOADS are those whose checkpoints are loaded. Both are joined by |.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from data.synthetic_corpora import write_split
from parity import LAYOUTS, Layout, held, join_experts
from tiny_training import LENGTH, SEQUENCES, VOCABULARY, fit, language_model, leave

from lightning_base.data.loader import TrainingLoader
from lightning_base.data.order import GlobalBatchSampler
from lightning_base.data.prepared import TokenSplit
from lightning_base.data.sequences import SequenceDataset
from lightning_base.distributed.expert_parallel import ExpertParallelStrategy
from lightning_base.module import LanguageModel
from lightning_base.program.build import Replicated, SingleProcess

SAVED, LAST = 2, 4
ROUTER = "base"  # has prices that it remembers


def write_text(folder: Path) -> None:
    """Random tokens to train on."""
    random = np.random.default_rng(0)
    write_split(folder, [[*random.integers(1, VOCABULARY, 3 * LENGTH).tolist(), 0] for _ in range(40)])


class Watch(pl.Callback):
    """Keeps what a rank holds when training begins, after the step in which it saves, and at the end."""

    def __init__(self, target: Path | None) -> None:
        self.target = target
        self.seen: dict[str, dict[str, Any]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *args: Any) -> None:
        if self.target is not None and trainer.global_step == SAVED and "saved" not in self.seen:
            trainer.save_checkpoint(self.target)
            self.seen["saved"] = state(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: LanguageModel, *args: Any) -> None:
        if "begun" not in self.seen:
            self.seen["begun"] = state(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        self.seen["ended"] = state(trainer, pl_module)


def state(trainer: pl.Trainer, module: LanguageModel) -> dict[str, Any]:
    """Weights and moments by name, buffers, and how far optimizer and schedule have come."""
    (optimizer,) = trainer.optimizers
    parameters = dict(module.named_parameters())
    moments = {
        f"{name}/{key}": held(module, {name: optimizer.state[parameter][key]})[name]
        for name, parameter in parameters.items()
        for key in ("exp_avg", "exp_avg_sq")
        if parameter in optimizer.state
    }
    return {
        "tensors": {**held(module, parameters), **moments},
        "buffers": {name: buffer.clone() for name, buffer in module.named_buffers()},
        "steps": {float(of_parameter["step"]) for of_parameter in optimizer.state.values()},
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"],
        "step": trainer.global_step,
        "experts": {len(layer.experts.w1[0]) for layer in module.model.sparse_layers.values()},
    }


def train(folder: Path, layout: str, rank: int, *, save: bool = False, resume: str | None = None) -> dict[str, Any]:
    """Trains to the end, from the beginning or from the checkpoint of a layout."""
    how = LAYOUTS[layout]
    module = language_model(ROUTER, max_steps=LAST, depth=4).double()
    sampler = GlobalBatchSampler(
        len(dataset := SequenceDataset(TokenSplit(folder, "hand", "<u2", 0), LENGTH, drop_last=True)),
        global_batch=SEQUENCES,
        seed=1,
        num_steps=LAST,
        world_size=how.ranks,
        rank=rank,
        accumulation=how.accumulation,
    )
    loader, watch = TrainingLoader(dataset, sampler), Watch(checkpoint_of(folder, layout) if save else None)
    fit(
        module,
        loader,
        watch,
        world_size=how.ranks,
        accumulation=how.accumulation,
        strategy=strategy(how),
        gradient_clip_val=0.3,
        resume=None if resume is None else checkpoint_of(folder, resume),
    )
    return {**watch.seen, "consumed": loader.state_dict()["sequences_consumed"]}


def strategy(layout: Layout) -> SingleProcess | Replicated | ExpertParallelStrategy:
    if layout.ranks == 1:
        return SingleProcess(device="cpu")
    found = layout.strategy()
    return Replicated(process_group_backend="gloo") if found is None else found


def checkpoint_of(folder: Path, layout: str) -> Path:
    return folder / layout.replace(" ", "_") / f"step_{SAVED}.ckpt"


def all_of(ranks: list[dict[str, Any]], layout: str, moment: str) -> dict[str, Any]:
    """What all ranks together hold at a moment, as one would; all must agree."""
    found = [rank[moment] for rank in ranks]
    for one in found:
        assert {k: one[k] for k in ("steps", "schedule", "step")} == {
            k: found[0][k] for k in ("steps", "schedule", "step")
        }
        assert all(torch.equal(buffer, found[0]["buffers"][name]) for name, buffer in one["buffers"].items())
    tensors = join_experts([one["tensors"] for one in found], LAYOUTS[layout].expert_group or 1)
    return {**found[0], "tensors": {**tensors, **found[0]["buffers"]}}


def run(folder: Path, saves: list[str], loads: list[str], rank: int) -> dict[Any, Any]:
    """Saves in some layouts, then loads in each of them every checkpoint asked for."""
    found: dict[Any, Any] = {layout: train(folder, layout, rank, save=True) for layout in saves}
    found |= {(source, target): train(folder, target, rank, resume=source) for source in loads for target in saves}
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    ranks, rank, place = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)), Path(sys.argv[1])
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
    saves, loads = ([name for name in names.split("|") if name] for names in sys.argv[2:])
    torch.save(run(place, saves, loads, rank), place / f"{ranks}_{rank}.pt")
    if ranks > 1:
        leave()
