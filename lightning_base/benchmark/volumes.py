"""What ranks would send and hold, on paper, from the tokens that a run's routing groups gave to each expert.

Shapes: W ranks, P ranks that share the experts, E experts, D width, A assignments of one rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float64, Int64
from numpy import ndarray
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_base.moe.dispatch import ShardedDispatcher
from lightning_base.moe.exchange import Exchange
from lightning_base.routing.plan import RoutingGroups, RoutingPlan
from lightning_base.routing.recording import read_pass

COUNT, NUMBER = 8, 4  # bytes of a count and of a float32


@dataclass(frozen=True)
class Volume:
    """What each of P ranks sends to the others for one sparse layer in one step without accumulation.

    Args:
        sent: [P] bytes, forward and backward; as many are received.
        largest: bytes of the largest message from one rank to another.
        dispatch_mean: of a message with tokens for experts.
        dispatch_largest: the largest of these.
    """

    sent: Float64[ndarray, " P"]
    largest: float
    dispatch_mean: float
    dispatch_largest: float


def recorded_counts(run: Path, layer: str, steps: int) -> Int64[ndarray, "G E"]:
    """The tokens of each expert in every routing group of the last ``steps`` of a run with recorded plans."""
    files: dict[str, list[Path]] = {}
    for path in sorted((run / "plans" / "train").glob("step_*.npz")):
        files.setdefault(path.name.partition(".")[0], []).append(path)
    groups = [plan for step in sorted(files)[-steps:] for plan in read_pass(tuple(files[step]))[layer].values()]
    return np.stack([np.bincount(plan.expert_index, minlength=len(plan.demand)) for plan in groups])


def volume(counts_PE: Int64[ndarray, "P E"], width: int, *, equal: bool) -> Volume:
    """The bytes of an expert group, where rank p holds experts p E/P to (p + 1) E/P - 1.

    Tokens go out and come back, and so do their gradients: a message of each pair in each direction, twice. Counts go
    ahead once, unless the loads are known to be equal.

    Args:
        counts_PE: [P, E], the tokens that each rank has for each expert.
        width: D.
        equal: whether the router declares equal loads.
    """
    ranks, experts = counts_PE.shape
    messages_PP = counts_PE.reshape(ranks, ranks, -1).sum(2).astype(float) * width * NUMBER
    np.fill_diagonal(messages_PP, 0)
    counts = 0 if equal else COUNT * experts // ranks
    sent = 2 * (messages_PP.sum(0) + messages_PP.sum(1)) + counts * (ranks - 1)
    largest, pairs = float(messages_PP.max()), ranks * (ranks - 1)
    return Volume(sent, max(largest, counts), float(messages_PP.sum()) / pairs, largest)


class KnownCounts(Exchange):
    """An exchange of a fake world, where nothing arrives: it is told what the others would have said."""

    def __init__(self, group: dist.ProcessGroup, arrive_PN: Int64[Tensor, "P N"]) -> None:
        super().__init__(group)
        self.arrive_PN = arrive_PN

    def counts(self, counts_PC: Int64[Tensor, "P C"]) -> Int64[Tensor, "P C"]:
        super().counts(counts_PC)
        return self.arrive_PN


class Sum:
    """A meter that adds up what leaves and reaches a rank."""

    def __init__(self, rank: int) -> None:
        self.rank, self.sent, self.received, self.largest = rank, 0, 0, 0

    def begin(self) -> None:
        """Nothing to time: nothing is sent."""

    def end(self, kind: str, sent: list[int], received: list[int]) -> None:
        others = [[n for i, n in enumerate(parts) if i != self.rank] for parts in (sent, received)]
        self.sent, self.received = self.sent + sum(others[0]), self.received + sum(others[1])
        self.largest = max(self.largest, *others[0], *others[1])


@contextmanager
def fake_world(ranks: int, rank: int) -> Iterator[None]:
    """Inside, this process is one of many ranks, the others of which are not there."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def metered(counts_PE: Int64[ndarray, "P E"], width: int, *, equal: bool, world: int, rank: int) -> Sum:
    """What the program's own dispatcher sends from one rank of a fake world, forward and backward.

    Args:
        counts_PE: [P, E], of the expert group of the rank.
        width: D.
        equal: whether the router declares equal loads.
        world: W, a multiple of P.
        rank: of the world.
    """
    ranks, experts = counts_PE.shape
    first = rank // ranks * ranks
    mine_E = torch.from_numpy(counts_PE[rank - first])
    expert_A = torch.repeat_interleave(mine_E)
    plan = RoutingPlan(
        token_index=torch.arange(len(expert_A)),
        expert_index=expert_A,
        weight=torch.ones(len(expert_A)),
        group_demand=mine_E[None],
        groups=RoutingGroups((len(expert_A),)),
        equal_loads=equal,
    )
    with fake_world(world, rank):
        group = dist.new_group(list(range(first, first + ranks)))
        here = slice((rank - first) * experts // ranks, (rank - first + 1) * experts // ranks)
        exchange = KnownCounts(group, torch.from_numpy(counts_PE[:, here].copy()))
        exchange.meter = total = Sum(exchange.rank)
        dispatcher = ShardedDispatcher(plan, exchange, same_sizes=True)
        tokens_AD = torch.zeros(len(expert_A), width, requires_grad=True)
        dispatcher.combine(dispatcher.dispatch(tokens_AD)).sum().backward()
    return total
