"""Sums over ranks, many in one collective."""

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


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
