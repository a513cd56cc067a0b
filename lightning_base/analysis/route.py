"""Validation text, routed by a run's checkpoints.

Shapes: B sequences, L positions, T tokens that are not padding.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm import tqdm

from lightning_base.analysis.run import FinishedRun, autocast, load_weights, open_model
from lightning_base.data import TextDataModule
from lightning_base.metrics.specialization import UNLABELLED, Choices, choices_of
from lightning_base.module import LanguageModel
from lightning_base.routing.plan import RoutingPlan


@dataclass(frozen=True)
class Text:
    """What is known of every routed token.

    Args:
        tokens: [T], its id.
        preceding: [T], the id of the token before it in its sequence; -1 for the first one.
        domain: [T], the domain of its document.
        domains: the names of the domains.
        vocab_size: tokens in the vocabulary.
    """

    tokens: Int64[Tensor, " T"]
    preceding: Int64[Tensor, " T"]
    domain: Int64[Tensor, " T"]
    domains: list[str]
    vocab_size: int


def read_text(data: TextDataModule) -> Text:
    """The validation tokens in the order in which they are routed."""
    prepared = data.prepared
    assert prepared is not None
    domain_of_document = torch.from_numpy(np.asarray(prepared.validation.domain_of_document, dtype=np.int64))
    tokens, before, domains = [], [], []
    for batch in data.val_dataloader():
        valid = batch["valid"]
        tokens.append(batch["input_ids"][valid])
        before.append(preceding(batch["input_ids"])[valid])
        domains.append(domain_of_document[batch["document"][valid]])
    return Text(torch.cat(tokens), torch.cat(before), torch.cat(domains), prepared.domains, prepared.vocab_size)


def preceding(input_ids: Int64[Tensor, "B L"]) -> Int64[Tensor, "B L"]:
    """The token before each; the model does not see what stands before a sequence's first."""
    shifted = input_ids.roll(1, dims=1)
    shifted[:, 0] = UNLABELLED
    return shifted


def route(run: FinishedRun, data: TextDataModule) -> Iterator[tuple[int, dict[str, Choices]]]:
    """Routes the text in evaluation mode: step and the choices of each sparse layer, by name.

    The newest checkpoint comes first, what all others are compared with; then the others, the oldest first. Only one of
    them is in memory at a time.
    """
    steps = list(run.checkpoints)
    module = open_model(run)
    # Written to a file, a bar is a line per refresh: fewer of them.
    pause = 0.1 if sys.stderr.isatty() else 5.0
    total = len(steps) * len(data.val_dataloader())
    with tqdm(total=total, unit="batch", delay=1.0, leave=False, file=sys.stderr, mininterval=pause) as bar:
        for i, step in enumerate([steps[-1], *steps[:-1]]):
            bar.set_description(f"routing at step {step}, checkpoint {i + 1} of {len(steps)}", refresh=False)
            load_weights(module, run.checkpoints[step], run.config.trainer.precision)
            plans: dict[str, list[RoutingPlan]] = {}
            for batch in data.val_dataloader():
                for layer, plan in plan_batch(module, batch, run.config.trainer.precision).items():
                    plans.setdefault(layer, []).append(plan)
                bar.update()
            yield step, {layer: choices_of(found) for layer, found in plans.items()}


def plan_batch(module: LanguageModel, batch: Mapping[str, Tensor], precision: str) -> dict[str, RoutingPlan]:
    """The plan of each sparse layer for one batch, on the CPU and without what is not needed of it."""
    on_device = {name: tensor.to(module.device) for name, tensor in batch.items()}
    with torch.no_grad(), autocast(module, precision):
        _, plans = module(on_device)
    return {
        layer: RoutingPlan(
            token_index=plan.token_index.cpu(),
            expert_index=plan.expert_index.cpu(),
            weight=plan.weight.detach().cpu(),
            group_demand=plan.group_demand.cpu(),
            groups=plan.groups,
            top_k=plan.top_k,
        )
        for layer, plan in plans.items()
    }
