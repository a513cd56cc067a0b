"""The control at the other end from ``uniform``: no balance at all.

Shapes: T tokens.
"""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router


class Skewed(Router):
    """Every token goes to expert 0, with weight 1: what a collapsed router does, and the worst case for compute.

    It computes what the dense arm computes, with E - 1 experts idle; what it costs beyond that is the price of
    imbalance.

    Args:
        num_experts: E.
    """

    refused_options: ClassVar[dict[str, str]] = {
        "top_k": "it sends every token to one expert",
        "renormalize": "its gate is always 1",
        "capacity_factor": "it measures the cost of imbalance, which dropping would hide",
        "balance_scope": "it has nothing to learn and no load-balancing loss",
    }

    def __init__(self, *, num_experts: int) -> None:
        super().__init__(num_experts=num_experts)

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        token_index = torch.arange(len(tokens), device=tokens.device)
        expert_index = torch.zeros_like(token_index)
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=tokens.new_ones(len(tokens)),
            group_demand=count_by_group(groups, self.num_experts, token_index, expert_index),
            groups=groups,
        )
