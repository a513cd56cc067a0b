"""Shuffling: the tokens of a training step dealt out at random to its routing groups, and so to ranks, and taken back.

Shapes: T tokens of this rank, N tokens of a part of the step, D width.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor, nn

from lightning_base.moe.dispatch import permute
from lightning_base.moe.exchange import Exchange
from lightning_base.routing.noise import draw_key, permutation
from lightning_base.routing.plan import RoutingGroups
from lightning_base.routing.router import Router


class Shuffle(nn.Module):
    """Which token of a training step goes to which of its routing groups: drawn from seed, layer and step.

    The tokens of one sequence are alike, and a group of few sequences asks for few experts; BASE's training therefore
    shuffles tokens over its workers, each of which then balances what it holds (Lewis et al. 2021). Here groups keep
    their sizes, and what they hold depends on neither ranks nor micro batches. Inside a group tokens stay in the order
    of the step: slots that are given in that order, and noise that hashes what was read before, know no later token of
    a sequence, shuffled or not.

    Only passes between ``begin`` and ``end`` are shuffled: evaluation and passes that belong to no step are not.

    Args:
        routing_group: sequences of a routing group.
        among: sequences of a part of the step; each part is shuffled by itself, so that micro batches can follow one
            another. None: the whole step, which has to be one micro batch.

    Attributes:
        exchange: between all ranks, in the order in which they share the sequences of a pass; None for one rank.
        padding: False if all sequences of a step are always of one length, so that ranks need not tell theirs.
    """

    def __init__(self, routing_group: int, among: int | None = None) -> None:
        super().__init__()
        if among is not None and (among < 1 or among % routing_group):
            raise ValueError(
                f"model.shuffle_tokens={among} is no multiple of data.routing_group={routing_group}: "
                "tokens are dealt out to whole routing groups"
            )
        self.routing_group, self.among = routing_group, among
        self.exchange: Exchange | None = None
        self.padding = True
        self._now: tuple[int, int] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the key that tells layers and seeds apart."""
        self.key = int(draw_key())

    def begin(self, step: int, micro_batch: int) -> None:
        """The passes that follow are of this micro batch of this optimizer step."""
        self._now = (step, micro_batch)

    def end(self) -> None:
        """The passes that follow are of no step."""
        self._now = None

    @torch.compiler.disable
    def deal(self, groups: RoutingGroups, device: torch.device | str = "cpu") -> "Deal | None":
        """How the tokens of a pass change places, seen from this rank; None between steps.

        Args:
            groups: of the tokens of this rank, with the tokens of each sequence.
            device: where the tokens are.

        Raises:
            ValueError: the sequences of the pass are no whole number of parts.
        """
        if self._now is None:
            return None
        step, micro_batch = self._now
        held = len(groups.sequences)
        rank, ranks = (0, 1) if self.exchange is None else (self.exchange.rank, self.exchange.size)
        part = self.among or held * ranks
        if held * ranks % part:
            raise ValueError(f"model.shuffle_tokens={part} does not divide the {held * ranks} sequences of a pass")
        slot = micro_batch * held * ranks  # of the step, where the pass begins
        if held % part == 0:  # no part reaches beyond a rank
            number = (slot + rank * held) // part
            return Deal(*self._places(groups.sequences, range(held // part), part, number, step), device)
        assert self.exchange is not None
        lengths = self._lengths(groups.sequences, self.exchange, device)
        touched = range(rank * held // part, -(-(rank + 1) * held // part))
        source_N, place_N = self._places(lengths, touched, part, slot // part, step)
        ends = [0, *accumulate(lengths)]
        before = ends[touched.start * part]
        mine = slice(ends[rank * held] - before, ends[(rank + 1) * held] - before)
        return Deal(source_N[mine], place_N[mine], device, self.exchange, ends[::held])

    def _places(
        self, lengths: Sequence[int], parts: range, part: int, number: int, step: int
    ) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " N"]]:
        """Which token stands in each place of these parts, and the place of each token, counted over ``lengths``.

        Args:
            lengths: tokens of each sequence.
            parts: which parts of these sequences.
            part: sequences of a part.
            number: of the first part of these sequences in the step.
            step: of training.
        """
        ends = [0, *accumulate(lengths)]
        source, place = [], []
        for i in parts:
            begin = ends[i * part]
            borders = torch.tensor(ends[i * part : (i + 1) * part + 1 : self.routing_group]) - begin
            size = int(borders[-1])
            drawn_N = permutation(size, key=self.key, step=step, part=number + i)
            group_N = torch.repeat_interleave(borders.diff())
            # Sorted within each group: there tokens keep the order of the step.
            source_N = (group_N * size + drawn_N).sort().values - group_N * size
            source.append(source_N + begin)
            place.append(source_N.argsort() + begin)
        return torch.cat(source), torch.cat(place)

    def _lengths(self, sequences: Sequence[int], exchange: Exchange, device: torch.device | str) -> list[int]:
        """Tokens of each sequence of the pass, of all ranks."""
        if not self.padding:
            return list(sequences) * exchange.size
        mine = torch.tensor(sequences, device=device).expand(exchange.size, -1)
        lengths: list[int] = exchange.counts(mine).flatten().tolist()
        return lengths


class Deal:
    """Carries out one shuffle.

    Args:
        source_T: [T], the token that is to stand in each place of this rank, counted over all ranks.
        place_T: [T], where each token of this rank is to stand.
        device: where the tokens are.
        exchange: between the ranks; None if all places are this rank's.
        borders: [W + 1], where the tokens of each rank begin, and where all end.
    """

    def __init__(
        self,
        source_T: Int64[Tensor, " T"],
        place_T: Int64[Tensor, " T"],
        device: torch.device | str,
        exchange: Exchange | None = None,
        borders: Sequence[int] = (),
    ) -> None:
        self._exchange = exchange
        self._arriving: tuple[Tensor, Tensor] | None = None
        if exchange is None:
            self._leaving = source_T.to(device), place_T.to(device)
            return
        ends = torch.tensor(borders[1:])
        from_T, to_T = (torch.searchsorted(ends, number_T, right=True) for number_T in (source_T, place_T))
        self._receive, self._send = (torch.bincount(x, minlength=exchange.size).tolist() for x in (from_T, to_T))
        # What one rank sends to another goes in the order of its places there.
        leaving_T, arriving_T = place_T.argsort(), from_T.argsort(stable=True)
        self._leaving = leaving_T.to(device), leaving_T.argsort().to(device)
        self._arriving = arriving_T.to(device), arriving_T.argsort().to(device)

    def shuffle(self, rows: Shaped[Tensor, "T *rest"]) -> Shaped[Tensor, "T *rest"]:
        """Rows of the tokens of this rank, to the rows of those that are to stand in its places."""
        rows = permute(rows, *self._leaving)
        if self._exchange is None or self._arriving is None:
            return rows
        order, back = self._arriving
        return permute(self._exchange.rows(rows, self._send, self._receive, "shuffle"), back, order)

    def unshuffle(self, rows: Shaped[Tensor, "T *rest"]) -> Shaped[Tensor, "T *rest"]:
        """The inverse of ``shuffle``."""
        if self._exchange is not None and self._arriving is not None:
            rows = self._exchange.rows(permute(rows, *self._arriving), self._receive, self._send, "unshuffle")
        order, back = self._leaving
        return permute(rows, back, order)


def check_shuffle(
    among: bool | int, router: Router, *, routing_group: int, global_batch: int, accumulation: int
) -> None:
    """Checks what ``model.shuffle_tokens`` asks of the rest of a run.

    Raises:
        ValueError: the router or the batch cannot do it.
    """
    if router.needs_sequences:
        raise ValueError(
            f"model.shuffle_tokens={among} with a balancing loss of {type(router).__name__} over single sequences: "
            "after the shuffle a routing group holds no whole sequence; balance over groups or the whole step instead"
        )
    at_once = global_batch // accumulation
    if among is True and accumulation > 1:
        raise ValueError(
            f"model.shuffle_tokens=true with trainer.accumulate_grad_batches={accumulation}: tokens of later micro "
            "batches are not there yet; shuffle among the sequences of one, "
            f"model.shuffle_tokens={at_once}, or among fewer"
        )
    if among is not True and (among % routing_group or at_once % among):
        raise ValueError(
            f"model.shuffle_tokens={among} has to be a multiple of data.routing_group={routing_group} and to divide "
            f"the {at_once} sequences that are computed at once (data.global_batch / trainer.accumulate_grad_batches)"
        )
