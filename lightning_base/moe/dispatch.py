"""Dispatch and combine: from tokens to experts and back, as a RoutingPlan says.

Shapes: A assignments, T tokens, D width, E experts.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_base.moe.rows import combine_rows, rows_by_token, take_rows
from lightning_base.routing.plan import RoutingPlan


class Dispatcher:
    """Carries out one RoutingPlan where every rank holds all experts.

    Attributes:
        counts: [E], tokens of each expert, in the order of the experts.
    """

    def __init__(self, plan: RoutingPlan) -> None:
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
