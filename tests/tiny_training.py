"""A language model of a few thousand parameters, trained for a few steps by a real Trainer, on one rank or on two."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy, Strategy
from router_arms import FOLDER
from torch import Tensor

from lightning_base.data.loader import TrainingLoader
from lightning_base.module import IGNORED, LanguageModel
from lightning_base.program.checkpoint import VerifiedCheckpointIO

VOCABULARY, LENGTH, WIDTH, SEQUENCES, GROUP = 48, 8, 16, 8, 2


def language_model(
    router: str,
    *,
    max_steps: int,
    learning_rate: float = 3e-3,
    depth: int = 2,
    shuffle_tokens: bool | int = False,
    **options: Any,
) -> LanguageModel:
    """A model of two blocks, the second of them sparse, with the router of conf/router/{router}.yaml.

    Args:
        router: its name.
        max_steps: optimizer steps.
        learning_rate: constant.
        depth: another number of blocks; every second one is sparse.
        shuffle_tokens: as in conf/model/.
        options: ``router_options`` go on top of the router's file, others to ``LanguageModel``.
    """
    node = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{router}.yaml"))
    assert isinstance(node, dict)
    optimizer = {
        "learning_rate": learning_rate,
        "warmup_steps": 0,
        "schedule": "constant",
        "final_learning_rate": 0.0,
        "router_learning_rate_factor": 1.0,
        "weight_decay": 0.0,
        "betas": [0.9, 0.95],
    }
    return LanguageModel(
        router={**node, **options.pop("router_options", {})},
        model={"width": WIDTH, "depth": depth, "heads": 2, "ffn_width": 32, "shuffle_tokens": shuffle_tokens},
        optimizer=optimizer,
        max_steps=max_steps,
        vocab_size=VOCABULARY,
        sequence_length=LENGTH,
        routing_group=GROUP,
        seed=0,
        **options,
    )


def micro_batches(
    step: int,
    *,
    world_size: int = 1,
    rank: int = 0,
    accumulation: int = 1,
    predict: bool = True,
    lengths: Sequence[int] = (LENGTH,) * SEQUENCES,
) -> list[dict[str, Any]]:
    """One rank's micro batches of a step, cut from the same global batch whatever the ranks; as the loader gives them.

    Args:
        step: another text at every step.
        world_size: W.
        rank: which of them.
        accumulation: micro batches per step and rank.
        predict: False leaves out every target, so that nothing but auxiliary losses is learned.
        lengths: of the sequences of the global batch; what is left of each is padding.
    """
    ids = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    every_valid = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    count, size = torch.tensor(sum(lengths)), SEQUENCES // (world_size * accumulation)
    parts = []
    for chunk, valid in list(zip(ids.split(size), every_valid.split(size), strict=True))[rank::world_size]:
        targets = chunk[:, 1:].masked_fill(~valid, IGNORED) if predict else torch.full_like(chunk[:, 1:], IGNORED)
        inputs = {"input_ids": chunk[:, :-1], "valid": valid, "document": torch.zeros_like(targets)}
        parts.append({**inputs, "targets": targets, "step_targets": count})
    ahead = [{name: part[name] for name in ("input_ids", "valid", "document")} for part in parts[1:]]
    return [{**parts[0], "ahead": ahead}, *parts[1:]]


def fit(
    module: LanguageModel,
    batches: list[dict[str, Any]] | TrainingLoader,
    *callbacks: pl.Callback,
    accumulation: int = 1,
    world_size: int = 1,
    strategy: Strategy | None = None,
    gradient_clip_val: float | None = None,
    resume: Path | None = None,
    logger: Logger | None = None,
) -> None:
    """Trains on the batches of this rank; with several ranks, inside the process group they have joined."""
    loader = Batches(batches) if isinstance(batches, list) else batches
    ddp = DDPStrategy(process_group_backend="gloo") if world_size > 1 else "auto"
    pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy or ddp,
        gradient_clip_val=gradient_clip_val,
        max_epochs=1,
        max_steps=module.max_steps,
        accumulate_grad_batches=accumulation,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        logger=logger or False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        plugins=[VerifiedCheckpointIO()],
    ).fit(module, loader, Batches([]), ckpt_path=resume, weights_only=True)


class Batches:
    """A loader of ready-made batches: Lightning asks a list how it was sampled."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def leave() -> NoReturn:
    """Ends a rank that has written what it found, as the program ends its ranks: after the others, and at once.

    Gloo's threads may abort the interpreter's ordinary end with "terminate called without an active exception", and a
    trainer may still hold the process group after ``destroy_process_group``.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
