"""The control without any routing: one expert, every token."""

import torch
from torch import Tensor

from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router


class Dense(Router):
    """One feed-forward network for all tokens: the layer a sparse one replaces, on the same code path.

    Its active FLOPs per token are those of one expert of a top-1 router.
    """

    def __init__(self, *, num_experts: int = 1, width: int = 0) -> None:
        super().__init__(num_experts=num_experts)
        if num_experts != 1:
            raise ValueError(f"router.num_experts={num_experts}: the dense arm has exactly 1 expert")

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        token_index = torch.arange(len(tokens), device=tokens.device)
        expert_index = torch.zeros_like(token_index)
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=tokens.new_ones(len(tokens)),
            group_demand=count_by_group(groups, 1, token_index, expert_index),
            groups=groups,
        )
