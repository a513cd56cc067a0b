"""Switch routing (Fedus, Zoph, Shazeer 2021, arXiv 2101.03961).

Shapes: T tokens, D width, E experts.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_base.routing.capacity import check_capacity_factor, expert_capacity, serve
from lightning_base.routing.losses import balancing_loss, check_scope
from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router
from lightning_base.routing.selection import full_precision

GATES = ("probability", "one")


class Switch(Router):
    """Each token goes to the expert of its largest softmax probability, with that probability as the gate (eq. 1, 2).

    An expert serves at most ceil(capacity_factor * T / E) tokens of a routing group, in the order of the tokens; the
    rest is dropped and passes by on the residual. The load-balancing loss (eq. 4) keeps drops few.

    Args:
        num_experts: E.
        width: D.
        capacity_factor: slots per expert in training, relative to an even share; None drops nothing.
        evaluation_capacity_factor: the same in evaluation.
        balance_scope: over what the load-balancing loss is taken, see ``balancing_loss``.
        gate: ``probability``, the paper's, or ``one``, whose gradient is that of the probability: an expert that is a
            copy of a trained feed-forward layer then starts as that layer does.
    """

    loss_coefficients: ClassVar[dict[str, float]] = {"load_balancing_loss": 0.01}
    refused_options: ClassVar[dict[str, str]] = {
        "top_k": "it sends every token to one expert; router=top_k takes router.top_k",
        "renormalize": "with one expert the renormalized gate would always be 1, and the router could not learn",
    }

    def __init__(
        self,
        *,
        num_experts: int,
        width: int,
        capacity_factor: float | None = 1.25,
        evaluation_capacity_factor: float | None = 2.0,
        balance_scope: str = "group",
        gate: str = "probability",
    ) -> None:
        super().__init__(num_experts=num_experts)
        if gate not in GATES:
            raise ValueError(f"router.gate={gate}: choose one of {', '.join(GATES)}")
        check_capacity_factor("capacity_factor", capacity_factor)
        check_capacity_factor("evaluation_capacity_factor", evaluation_capacity_factor)
        check_scope(balance_scope)
        self.balance_scope, self.gate_value = balance_scope, gate
        self.straight_through = gate == "one"
        self.capacity_factor = capacity_factor
        self.evaluation_capacity_factor = evaluation_capacity_factor
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.reset_parameters()

    @property
    def needs_sequences(self) -> bool:
        return self.balance_scope == "sequence"

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.gate.weight, std=(0.1 / self.gate.in_features) ** 0.5)

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        # Selective precision (section 2.4): the softmax is taken in float32 whatever the layer runs in.
        with torch.autocast(tokens.device.type, enabled=False):
            logits_TE = nn.functional.linear(full_precision(tokens), full_precision(self.gate.weight))
        probabilities_TE = logits_TE.softmax(-1)
        weight, expert_index = probabilities_TE.max(-1)
        if self.gate_value == "one":
            weight = 1 + (weight - weight.detach())
        token_index = torch.arange(len(tokens), device=tokens.device)
        group_demand = count_by_group(groups, self.num_experts, token_index, expert_index)
        balance = balancing_loss(probabilities_TE, token_index, expert_index, groups, self.balance_scope)

        capacity = None
        factor = self.capacity_factor if self.training else self.evaluation_capacity_factor
        if factor is not None:
            slots = expert_capacity(groups, self.num_experts, 1, factor)
            kept, capacity = serve(groups, token_index, expert_index, slots, self.num_experts)
            token_index, expert_index, weight = token_index[kept], expert_index[kept], weight[kept]
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=weight,
            group_demand=group_demand,
            groups=groups,
            capacity=capacity,
            losses=balance.losses,
            step_losses=balance.step_losses,
            aux={"probabilities": probabilities_TE.detach()},
        )
