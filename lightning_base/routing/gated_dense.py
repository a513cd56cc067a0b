"""The control for what a gate alone does: one expert, every token, and BASE's gate.

Shapes: T tokens, D width.
"""

import torch
from torch import Tensor, nn

from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router
from lightning_base.routing.selection import full_precision


class GatedDense(Router):
    """One feed-forward network for all tokens, weighted by sigmoid(h_t . w): BASE (eq. 1) with a single expert.

    What a sparse arm gains over ``dense`` and this one gains too is owed to the gate and not to the routing.

    Args:
        num_experts: 1.
        width: D.
    """

    def __init__(self, *, width: int, num_experts: int = 1) -> None:
        super().__init__(num_experts=num_experts)
        if num_experts != 1:
            raise ValueError(f"router.num_experts={num_experts}: the dense arms have exactly 1 expert")
        self.gate = nn.Parameter(torch.empty(1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.gate, gain=0.1)

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        with torch.autocast(tokens.device.type, enabled=False):
            weight = nn.functional.linear(full_precision(tokens), full_precision(self.gate))[:, 0].sigmoid()
        token_index = torch.arange(len(tokens), device=tokens.device)
        expert_index = torch.zeros_like(token_index)
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=weight,
            group_demand=count_by_group(groups, 1, token_index, expert_index),
            groups=groups,
            aux={"gates": weight.detach()},
        )
