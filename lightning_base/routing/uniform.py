"""The control that balances without looking: round-robin over experts."""

import torch
from torch import Tensor

from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router


class Uniform(Router):
    """Token t of a routing group goes to expert t mod E, with weight 1: perfectly even and learns nothing.

    What a sparse arm gains over this one is what its choice of experts is worth.
    """

    def __init__(self, *, num_experts: int, width: int = 0) -> None:
        super().__init__(num_experts=num_experts)

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        token_index = torch.arange(len(tokens), device=tokens.device)
        starts = torch.tensor(groups.starts(), device=tokens.device, dtype=torch.int64)
        expert_index = (token_index - starts[groups.index(tokens.device)]) % self.num_experts
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=tokens.new_ones(len(tokens)),
            group_demand=count_by_group(groups, self.num_experts, token_index, expert_index),
            groups=groups,
            equal_loads=groups.even_over(self.num_experts),
        )
