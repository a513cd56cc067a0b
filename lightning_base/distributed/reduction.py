"""What ranks tell each other: sums, many in one collective, and objects; and who they are."""

import os
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")


def rank() -> int:
    """The number of this process in the process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def rank_of_this_process() -> int:
    """As torchrun has numbered it, before there is a process group.

    Lightning's ``rank_zero_only.rank`` is 0 on every rank until there is a Trainer, if the processes were forked.
    """
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes there are in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def over_ranks(value: T) -> list[T]:
    """The value of every rank, in their order; every rank has to call it."""
    if world_size() == 1:
        return [value]
    found: list[T] = [value] * world_size()
    dist.all_gather_object(found, value)
    return found


def sum_over_ranks(values: Mapping[Key, Tensor], reduce: Callable[[Tensor], Tensor]) -> dict[Key, Tensor]:
    """The sum of each value over ranks, in its own shape and dtype.

    Sent as one vector in double precision, which holds counts exactly up to 2^53: a step of a deep model would
    otherwise wait for a dozen small collectives.

    Args:
        values: the same keys and shapes on every rank.
        reduce: the sum of one tensor over ranks.
    """
    if not values:
        return {}
    flat = reduce(torch.cat([value.detach().double().flatten() for value in values.values()]))
    parts = flat.split([value.numel() for value in values.values()])
    return {
        key: part.view(value.shape).to(value.dtype) for (key, value), part in zip(values.items(), parts, strict=True)
    }
