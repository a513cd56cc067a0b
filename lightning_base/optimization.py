"""The optimizer of every arm, and its schedule."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_base.routing.router import Router
from lightning_base.sparse_model import SparseModel


def make_optimizer(
    model: SparseModel, options: Mapping[str, Any], max_steps: int, *, fused: bool = True
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW; weight decay on matrices alone, not on norms, embeddings and routers. These have a rate of theirs.

    Args:
        model: whose parameters are trained.
        options: those of ``conf/config.yaml`` under ``module``.
        max_steps: optimizer steps of the whole run, which the schedule spans.
        fused: reads and writes parameters, gradients and moments once a step and not once per operation.
    """
    rate = float(options["learning_rate"])
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    first, second = (float(beta) for beta in options["betas"])
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    # Their first dimension is the expert.
    experts = {p for layer in model.sparse_layers.values() for p in layer.experts.parameters()}
    routers = {p: None for m in model.modules() if isinstance(m, Router) for p in m.parameters()}
    for parameter in model.parameters():
        if parameter not in routers:
            vector = parameter.ndim - (parameter in experts) < 2
            (kept if vector or id(parameter) in embeddings else decayed).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": float(options["weight_decay"])},
            {"params": kept, "weight_decay": 0.0},
            {"params": list(routers), "weight_decay": 0.0, "lr": rate * options["router_learning_rate_factor"]},
        ],
        lr=rate,
        betas=(first, second),
        fused=fused,
    )
    return optimizer, LambdaLR(optimizer, partial(schedule, options, max_steps))


def schedule(options: Mapping[str, Any], max_steps: int, step: int) -> float:
    """The rate after ``step`` steps over the highest one: linear warm-up, then cosine, linear or constant."""
    warmup, peak = options["warmup_steps"], float(options["learning_rate"])
    final = float(options["final_learning_rate"]) / peak
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if options["schedule"] == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    left = 1 - done if options["schedule"] == "linear" else (1 + math.cos(math.pi * done)) / 2
    return final + (1 - final) * left


def learning_rate(options: Mapping[str, Any], step: int, max_steps: int) -> float:
    """The rate of a step; the first is 1."""
    return float(options["learning_rate"]) * schedule(options, max_steps, step - 1)
