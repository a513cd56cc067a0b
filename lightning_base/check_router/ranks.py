"""The same three steps of training on one rank, with accumulation, and on two ranks, in float64.

Shapes: B sequences, L positions, D width.
"""

import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_base.auxiliary_losses import auxiliary_losses, step_counts
from lightning_base.check_router.apart import Apart, Ended
from lightning_base.check_router.check import Broken, check
from lightning_base.check_router.padding import layer_of
from lightning_base.check_router.subject import Subject, decisions, differ, told
from lightning_base.distributed.reduction import rank as own_rank
from lightning_base.distributed.reduction import sum_over_ranks, world_size
from lightning_base.moe import SparseLayer

STEPS, LEARNING_RATE, TOLERANCE = 3, 0.05, 1e-6
# Of the sequences of a step; what is left of each is padding. Groups are of two sequences, and none is empty: a loss is
# averaged over the groups of a pass, and passes count alike.
LENGTHS = ((6,) * 8, (6, 3, 5, 6, 1, 4, 2, 1), (6, 3, 5, 6, 1, 4, 2, 6))
# Micro batches of each of two ranks.
LAYOUTS = {1: "on two ranks", 2: "on two ranks with two micro batches each"}


@check
def accumulation(subject: Subject) -> None:
    """Two micro batches teach and count what the whole batch does."""
    compare(training(subject), training(subject, accumulation=2), "in two micro batches")


@check
def ranks(subject: Subject) -> None:
    """Two ranks, real processes on gloo, learn and remember what one does."""
    found = on_two_ranks(subject)
    alone = training(subject)
    for (first, second), where in zip(found, LAYOUTS.values(), strict=True):
        for name, value in first["after"].items():
            if value != second["after"][name]:
                raise Broken(
                    f"{where} {name} was not the same on both after {STEPS} steps: change what is remembered in "
                    "end_step alone, from its sums over all ranks"
                )
        steps = [{**one, **other} for one, other in zip(first["steps"], second["steps"], strict=True)]
        compare(alone, {**first, "steps": steps}, where)


def on_two_ranks(subject: Subject) -> list[tuple[dict[str, Any], ...]]:
    """What each of two ranks has found, layout by layout."""
    until = time.monotonic() + 0.8 * subject.seconds
    with tempfile.TemporaryDirectory(prefix="lightning_base_ranks_") as folder:
        both = [Apart(on_rank, subject, rank, str(Path(folder, "meet"))) for rank in range(2)]
        try:
            found = [rank.answer(until) for rank in both]
        except TimeoutError:
            raise Broken(
                f"on two ranks it was still running after {0.8 * subject.seconds:.0f} s: a router knows no ranks and "
                "may not wait for others; what it needs of them comes to end_step"
            ) from None
        except Ended as error:
            raise Broken(
                f"on two ranks {error}; a router knows no ranks: what it needs of them comes to end_step"
            ) from error
        finally:
            for rank in both:
                rank.end()
    return list(zip(*found, strict=True))


def on_rank(subject: Subject, rank: int, meet: str) -> list[dict[str, Any]]:
    """Trains as one of two ranks, in each layout."""
    wait = timedelta(seconds=subject.seconds)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2, timeout=wait)
    found = [training(subject, accumulation=accumulation) for accumulation in LAYOUTS]
    dist.barrier()
    return found


def training(subject: Subject, *, accumulation: int = 1) -> dict[str, Any]:
    """Trains a layer on this rank's share of each step.

    Returns:
        plain values: ``steps``, of each step the experts of every token by sequence and place; ``losses`` of all ranks
        together; ``after``, parameters and buffers by name.
    """
    layer = layer_of(subject.build()).double()
    steps, losses = [], []
    for seed, lengths in enumerate(LENGTHS):
        passes = list(micro_batches(subject, seed, lengths, accumulation))
        loss, found = one_step(layer, passes, subject.scale * sum(lengths), accumulation)
        losses.append(loss)
        steps.append(found)
    after = {f"the parameter {n}": p.detach().flatten().tolist() for n, p in layer.named_parameters()}
    after |= {f"the buffer {n}": b.double().flatten().tolist() for n, b in layer.named_buffers()}
    return {"steps": steps, "losses": losses, "after": after}


def micro_batches(
    subject: Subject, seed: int, lengths: tuple[int, ...], accumulation: int
) -> Iterator[tuple[range, Tensor, Tensor, Tensor]]:
    """This rank's micro batches of a step: their sequences, hidden states, token ids, and which are no padding.

    Micro batch a of rank r holds b sequences from (a W + r) b on.
    """
    count, length = len(lengths), max(lengths) * subject.scale
    hidden, ids = subject.tokens(count * length, seed)
    hidden, ids = hidden.double().view(count, length, -1), ids.view(count, length)
    valid = torch.arange(length) < subject.scale * torch.tensor(lengths)[:, None]
    size = count // (world_size() * accumulation)
    for micro_batch in range(accumulation):
        begin = (micro_batch * world_size() + own_rank()) * size
        mine = slice(begin, begin + size)
        yield range(begin, begin + size), hidden[mine], ids[mine], valid[mine]


def one_step(
    layer: SparseLayer, passes: list[tuple[range, Tensor, Tensor, Tensor]], num_tokens: int, accumulation: int
) -> tuple[float, dict[tuple[int, int], Any]]:
    """A step of gradient descent; the loss of all ranks, and the experts of this rank's tokens."""
    router, parts = layer.router, accumulation * world_size()
    found: dict[tuple[int, int], Any] = {}
    plans, share = [], torch.zeros((), dtype=torch.float64)
    for sequences, hidden, ids, valid in passes:
        output, plan = layer(hidden, ids, valid)
        plans.append(plan)
        share = share + output[valid].square().sum() / num_tokens
        places = [
            (b, p) for b, row in zip(sequences, valid.tolist(), strict=True) for p, real in enumerate(row) if real
        ]
        found.update(zip(places, decisions(plan), strict=True))
    counts: dict[tuple[str, str], Tensor] = {}
    sums: dict[str, Tensor] = {}
    for plan in plans:
        for key, value in step_counts({"layer": plan}).items():
            counts[key] = counts[key] + value if key in counts else value
        for name, value in router.step_sums(plan.detached()).items():
            sums[name] = sums[name] + value if name in sums else value
    counts = sum_over_ranks(counts, reduced)
    coefficients = router.loss_coefficients
    for plan in plans:
        for name, value in auxiliary_losses({"layer": plan}, coefficients, counts, parts).items():
            share = share + coefficients[name] * value / parts
    share.backward()
    for parameter in layer.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.data -= LEARNING_RATE * reduced(gradient)
        parameter.grad = None
    router.end_step(sum_over_ranks(sums, reduced))
    return float(reduced(share.detach())), found


def reduced(value: Tensor) -> Tensor:
    """The sum over ranks."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def compare(one: dict[str, Any], other: dict[str, Any], where: str) -> None:
    """Raises ``Broken`` for the first thing that differs."""
    for step, (first, second) in enumerate(zip(one["steps"], other["steps"], strict=True)):
        for place, decision in first.items():
            if differ(decision, second[place]):
                raise Broken(
                    f"in step {step} of training, token {place[1]} of sequence {place[0]} had {told(decision)} when "
                    f"one rank computed the batch at once, and {told(second[place])} {where}: go by the routing group "
                    "and by buffers that end_step changes, never by how many tokens or passes there are"
                )
    for step, (loss, another) in enumerate(zip(one["losses"], other["losses"], strict=True)):
        if abs(loss - another) > TOLERANCE * max(1.0, abs(loss)):
            raise Broken(
                f"in step {step} of training the loss was {loss:.8g} when one rank computed the batch at once, and "
                f"{another:.8g} {where}: average auxiliary losses over routing groups, or return them in step_losses"
            )
    for name, values in one["after"].items():
        largest = max((abs(value) for value in values), default=0.0)
        apart = max((abs(a - b) for a, b in zip(values, other["after"][name], strict=True)), default=0.0)
        if apart > TOLERANCE * max(1.0, largest):
            raise Broken(
                f"after {STEPS} steps {name} differed by {apart:.3g} between one rank that computed each batch at once "
                f"and the same {where}: step_sums gives sums over tokens or groups, and end_step divides them"
            )
