"""Top-k softmax routing (Shazeer et al. 2017, arXiv 1701.06538; as in Mixtral and OLMoE, arXiv 2409.02060).

Shapes: T tokens, D width, E experts, K experts per token.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_base.routing.capacity import check_capacity_factor, expert_capacity, within_capacity
from lightning_base.routing.losses import load_balancing_loss
from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router


class TopK(Router):
    """Each token goes to the k experts of its largest softmax probabilities.

    Args:
        num_experts: E.
        width: D.
        top_k: k.
        renormalize: gates of the k chosen sum to 1 (a softmax over the chosen); otherwise they are the probabilities
            over all E. With k = 1 the gate would be a constant, so that the router could not learn: refused.
        capacity_factor: slots per expert, relative to an even share, in training and evaluation; None drops nothing.
            First choices are served before second choices, each in the order of the tokens, so that a token's second
            choice may lose its slot to a later token's first: with k > 1 and a capacity the router is not causal.
    """

    loss_coefficients: ClassVar[dict[str, float]] = {"load_balancing_loss": 0.01}

    def __init__(
        self,
        *,
        num_experts: int,
        width: int,
        top_k: int = 2,
        renormalize: bool = True,
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        if renormalize and top_k == 1:
            raise ValueError(
                "router.renormalize=true with router.top_k=1: the gate would always be 1 and the router could not "
                "learn; set router.renormalize=false"
            )
        check_capacity_factor("capacity_factor", capacity_factor)
        self.renormalize = renormalize
        self.capacity_factor = capacity_factor
        self.causal = self.causal_in_evaluation = capacity_factor is None or top_k == 1
        self.gate = nn.Linear(width, num_experts, bias=False)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.gate.weight, std=(0.1 / self.gate.in_features) ** 0.5)

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        with torch.autocast(tokens.device.type, enabled=False):
            logits_TE = nn.functional.linear(tokens.float(), self.gate.weight.float())
        probabilities_TE = logits_TE.softmax(-1)
        weight_TK, expert_TK = probabilities_TE.topk(self.top_k, dim=-1)
        if self.renormalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        # Choice-major order: all first choices come before any second one, which is the priority under a capacity.
        weight, expert_index = weight_TK.t().reshape(-1), expert_TK.t().reshape(-1)
        token_index = torch.arange(len(tokens), device=tokens.device).repeat(self.top_k)
        group_demand = count_by_group(groups, self.num_experts, token_index, expert_index)
        losses = {"load_balancing_loss": load_balancing_loss(probabilities_TE, group_demand, groups)}

        capacity = None
        if self.capacity_factor is not None:
            slots = expert_capacity(groups, self.num_experts, self.top_k, self.capacity_factor)
            capacity = torch.tensor(slots, device=tokens.device, dtype=torch.int64)
            group_index = groups.index(tokens.device)[token_index]
            kept = within_capacity(group_index, expert_index, capacity, self.num_experts)
            token_index, expert_index, weight = token_index[kept], expert_index[kept], weight[kept]
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=weight,
            group_demand=group_demand,
            groups=groups,
            top_k=self.top_k,
            capacity=capacity,
            losses=losses,
            aux={"probabilities": probabilities_TE.detach()},
        )
