"""Dispatch and combine: from tokens to experts and back, as a RoutingPlan says.

Shapes: A assignments, T tokens, D width, E experts; P ranks that share them, N = E / P experts of each, M assignments
that arrive on this one.
"""

from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from lightning_base.moe.exchange import Exchange
from lightning_base.moe.rows import combine_rows, rows_by_token, take_rows
from lightning_base.routing.plan import RoutingPlan


@runtime_checkable
class Dispatch(Protocol):
    """What a sparse layer needs to carry out one RoutingPlan.

    Attributes:
        plan: what is carried out.
        counts: tokens of each expert that this rank holds, in the order of the experts.
    """

    plan: RoutingPlan
    counts: Int64[Tensor, " _"]

    def dispatch(self, tokens_TD: Float[Tensor, "T D"]) -> Float[Tensor, "M D"]:
        """The tokens of this rank's first expert, then of its second, and so on, [M, D]."""

    def combine(self, outputs_MD: Float[Tensor, "M D"]) -> Float[Tensor, "T D"]:
        """Each token's outputs summed by weight, [T, D]; zero for a token that no expert took."""


class Dispatcher:
    """Carries out one RoutingPlan where every rank holds all experts."""

    def __init__(self, plan: RoutingPlan) -> None:
        self.plan = plan
        self.num_tokens = plan.num_tokens
        self.counts: Int64[Tensor, " E"] = plan.load
        # Stable, so that an expert sees its tokens in the plan's order whatever the device.
        order = torch.argsort(plan.expert_index, stable=True)
        self._token_index = plan.token_index[order]
        self._weight = plan.weight[order]
        self._on_cpu = order.device.type == "cpu"
        if self._on_cpu:
            self._position, self._begin = rows_by_token(self._token_index, self.num_tokens)

    def dispatch(self, tokens_TD: Float[Tensor, "T D"]) -> Float[Tensor, "A D"]:
        """The tokens of expert 0, then of expert 1, and so on, [A, D]."""
        if self._on_cpu:
            return take_rows(tokens_TD, self._token_index, self._position, self._begin)
        return tokens_TD.index_select(0, self._token_index)

    def combine(self, outputs_AD: Float[Tensor, "A D"]) -> Float[Tensor, "T D"]:
        """Each token's outputs summed by weight, [T, D]; zero for a token that no expert took."""
        if self._on_cpu:
            return combine_rows(outputs_AD, self._weight, self._token_index, self._position, self._begin)
        weighted_AD = outputs_AD * self._weight[:, None].to(outputs_AD.dtype)
        result_TD = outputs_AD.new_zeros(self.num_tokens, outputs_AD.shape[1])
        return result_TD.index_add(0, self._token_index, weighted_AD)


class ShardedDispatcher:
    """Carries out one RoutingPlan where rank p of a group holds experts p N to (p + 1) N - 1.

    Every rank of the group has to carry out a plan of its own at the same time, if only one without tokens. Counts go
    first, so that loads may be anything; where they are known to be equal they need not.

    Args:
        plan: of the tokens of this rank, for all E experts.
        exchange: between the ranks of the group.
        same_sizes: the routing groups of all ranks have the same sizes, always.

    Raises:
        RuntimeError: the plan declares equal loads and has others.
    """

    def __init__(self, plan: RoutingPlan, exchange: Exchange, *, same_sizes: bool = False) -> None:
        self._local = Dispatcher(plan)
        self._exchange = exchange
        mine_PN = self._local.counts.view(exchange.size, -1)
        if plan.equal_loads and same_sizes:
            each = len(plan.token_index) // plan.num_experts
            if mine_PN.device.type == "cpu" and not bool((mine_PN == each).all()):
                raise RuntimeError(f"the plan declares equal loads, and has {mine_PN.flatten().tolist()}")
            arrived_PN = torch.full_like(mine_PN, each)
            self._send = self._receive = [each * mine_PN.shape[1]] * exchange.size
        else:
            arrived_PN = exchange.counts(mine_PN)
            self._send, self._receive = torch.stack([mine_PN.sum(1), arrived_PN.sum(1)]).tolist()
        self.counts: Int64[Tensor, " N"] = arrived_PN.sum(0)
        computed = sum(self._receive)
        self.plan = replace(plan, aux={**plan.aux, "computed": self.counts.new_tensor(computed)})
        # What arrives lies by rank and then by expert, and the experts want it the other way round.
        expert_M = torch.arange(mine_PN.shape[1], device=mine_PN.device).repeat(exchange.size)
        expert_M = expert_M.repeat_interleave(arrived_PN.flatten(), output_size=computed)
        self._order = torch.argsort(expert_M, stable=True) if mine_PN.shape[1] > 1 else None
        self._back = None if self._order is None else torch.argsort(self._order)

    def dispatch(self, tokens_TD: Float[Tensor, "T D"]) -> Float[Tensor, "M D"]:
        rows_AD = self._local.dispatch(tokens_TD)
        arrived_MD = self._exchange.rows(rows_AD, self._send, self._receive, "dispatch")
        return permute(arrived_MD, self._order, self._back)

    def combine(self, outputs_MD: Float[Tensor, "M D"]) -> Float[Tensor, "T D"]:
        outputs_MD = permute(outputs_MD, self._back, self._order)
        return self._local.combine(self._exchange.rows(outputs_MD, self._receive, self._send, "combine"))


def permute(rows_MD: Shaped[Tensor, "M *D"], order: Tensor | None, back: Tensor | None) -> Shaped[Tensor, "M *D"]:
    """Rows in another order, given that and its inverse; None leaves them as they are."""
    if order is None or back is None:
        return rows_MD
    if rows_MD.device.type == "cpu" and rows_MD.is_floating_point():
        return take_rows(rows_MD, order, back, torch.arange(len(order) + 1))
    return rows_MD.index_select(0, order)
