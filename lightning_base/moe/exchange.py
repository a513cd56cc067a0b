"""Messages between the ranks of a group: rows of tokens there and back, with their gradients.

Shapes: P ranks of the group, N and M rows, D width, C counts.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Int64, Shaped
from torch import Tensor


@runtime_checkable
class Meter(Protocol):
    """Whoever wants to know what is sent: told of every message right before it is sent and right after it arrived."""

    def begin(self) -> None: ...

    def end(self, kind: str, sent: list[int], received: list[int]) -> None:
        """Bytes to and from every rank of the group, this one included. ``kind`` is ``counts``, or what the caller of
        ``Exchange.rows`` named it, with ``_backward`` for the gradients."""


class Exchange:
    """Sends rows between the ranks of a group. All messages of sharded layers go through ``_all_to_all``.

    Every rank of the group has to make the same calls in the same order; a rank without rows makes them too.

    Args:
        group: the ranks that talk to each other; on CPUs gloo, on GPUs NCCL.

    Attributes:
        meter: is told of every message, if whoever wants to know sets one.
        size: P.
        rank: of this process in the group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.meter: Meter | None = None

    @torch.compiler.disable
    def counts(self, counts_PC: Int64[Tensor, "P C"]) -> Int64[Tensor, "P C"]:
        """Row p goes to rank p; gives what each rank sent here, in the order of the ranks."""
        return self._all_to_all("counts", counts_PC.contiguous(), [1] * self.size, [1] * self.size)

    @torch.compiler.disable  # it could not know how many rows arrive
    def rows(
        self, rows_ND: Shaped[Tensor, "N *D"], send: Sequence[int], receive: Sequence[int], kind: str = "rows"
    ) -> Shaped[Tensor, "M *D"]:
        """Rows from every rank of the group, in the order of the ranks; their gradients go back the same way.

        Args:
            rows_ND: those for rank 0, then those for rank 1, ...
            send: how many there are for each rank, summing to N.
            receive: how many come from each rank, summing to M; ``counts`` finds out.
            kind: a name for the meter.
        """
        return _Rows.apply(rows_ND, self, list(send), list(receive), kind)

    def _all_to_all(self, kind: str, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        arrived = rows.new_empty(sum(receive), *rows.shape[1:])
        if self.meter is not None:
            self.meter.begin()
        dist.all_to_all_single(arrived, rows, receive, send, group=self.group)
        if self.meter is not None:
            of_row = rows.shape[1:].numel() * rows.element_size()
            self.meter.end(kind, [n * of_row for n in send], [n * of_row for n in receive])
        return arrived


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, exchange: Exchange, send: list[int], receive: list[int], kind: str
    ) -> Tensor:
        ctx.exchange, ctx.send, ctx.receive, ctx.kind = exchange, send, receive, kind
        return exchange._all_to_all(kind, rows_ND.contiguous(), send, receive)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        back = ctx.exchange._all_to_all(f"{ctx.kind}_backward", grad_MD.contiguous(), ctx.receive, ctx.send)
        return back, None, None, None, None
