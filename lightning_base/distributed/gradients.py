"""The norm of gradients that lie on several ranks."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gradient_norm(parameters: Iterable[nn.Parameter], held_with: Mapping[nn.Parameter, dist.ProcessGroup]) -> Tensor:
    """The 2-norm of all gradients together, each number in it once; the same on every rank.

    Args:
        parameters: with their gradients, as far as they have any.
        held_with: those of which this rank holds a part, with the ranks that hold the whole together. Of the others
            every rank holds all.
    """
    by_group: dict[dist.ProcessGroup | None, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_group.setdefault(held_with.get(parameter), []).append(local(parameter.grad))
    norms = {group: torch.nn.utils.get_total_norm(gradients) for group, gradients in by_group.items()}
    if norms.keys() <= {None}:
        return norms.get(None, torch.zeros(()))
    squares = []
    for group, norm in norms.items():
        square = norm.double() ** 2
        if group is not None:
            dist.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt().to(next(iter(norms.values())).dtype)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scales all gradients so that their norm, which is known, is at most ``max_norm``."""
    given = list(parameters)
    # One call for many tensors takes no mixture of plain and distributed ones.
    mixed = any(isinstance(parameter.grad, DTensor) for parameter in given)
    torch.nn.utils.clip_grads_with_norm_(given, max_norm, norm, foreach=False if mixed else None)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a distributed tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
