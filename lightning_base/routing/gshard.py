"""GShard's top-2 gating (Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1).

Shapes: T tokens, D width, E experts; the two choices of a token are a dimension of their own.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_base.routing.capacity import check_capacity_factor, expert_capacity, serve
from lightning_base.routing.losses import balancing_loss, check_scope
from lightning_base.routing.noise import draw_key, uniform_noise
from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router
from lightning_base.routing.selection import full_precision


class GShard(Router):
    """Each token goes to the expert of its largest probability, and to the second as often as its gate says.

    Gates are probabilities over all experts, the two chosen renormalized to sum 1. In training the second expert is
    asked with probability 2 g2 only, so that one of little weight seldom takes a slot; in evaluation always. An expert
    serves at most ceil(capacity_factor * 2 T / E) tokens of a routing group, all first choices before any second one,
    each in the order of the tokens. The load-balancing loss compares first choices with mean probabilities.

    A slot is taken only by who asked for it. Read to the letter, the last line of algorithm 1 also moves an expert's
    queue on for a second choice that the draw turned away, and so leaves slots empty while later tokens are dropped.
    The loss is the paper's times E^2, which makes it 1 under uniform routing; the paper leaves its coefficient open.

    Args:
        num_experts: E, at least 2.
        width: D.
        capacity_factor: slots per expert, relative to an even share of both choices; None drops nothing. With one below
            E/2, a token's second choice may lose its slot to a later token's first: the router is not causal.
        balance_scope: over what the load-balancing loss is taken, see ``balancing_loss``.
    """

    asks_for_fewer = True
    key: Tensor
    step: Tensor
    loss_coefficients: ClassVar[dict[str, float]] = {"load_balancing_loss": 0.01}
    refused_options: ClassVar[dict[str, str]] = {
        "top_k": "it sends every token to at most two experts; router=top_k takes router.top_k",
        "renormalize": "its two gates always sum to 1, and how often the second is asked depends on that",
    }

    def __init__(
        self,
        *,
        num_experts: int,
        width: int,
        capacity_factor: float | None = 1.0,
        balance_scope: str = "group",
    ) -> None:
        if num_experts < 2:
            raise ValueError(f"router.num_experts={num_experts}: GShard chooses two experts, give at least 2")
        super().__init__(num_experts=num_experts, top_k=2)
        check_capacity_factor("capacity_factor", capacity_factor)
        check_scope(balance_scope)
        self.capacity_factor = capacity_factor
        self.balance_scope = balance_scope
        # With a slot for every token of the group nothing is ever dropped.
        self.causal = capacity_factor is None or 2 * capacity_factor >= num_experts
        self.evaluation_modes = {"default": self.causal}
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.register_buffer("key", torch.zeros((), dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.reset_parameters()

    @property
    def needs_token_ids(self) -> bool:
        return self.training

    @property
    def needs_sequences(self) -> bool:
        return self.balance_scope == "sequence"

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.gate.weight, std=(0.1 / self.gate.in_features) ** 0.5)
        self.key.copy_(draw_key())

    def end_step(self, sums: dict[str, Tensor]) -> None:
        self.step += 1

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        with torch.autocast(tokens.device.type, enabled=False):
            logits_TE = nn.functional.linear(full_precision(tokens), full_precision(self.gate.weight))
        probabilities_TE = logits_TE.softmax(-1)
        gate_T2, expert_T2 = probabilities_TE.topk(2, dim=-1)
        gate_T2 = gate_T2 / gate_T2.sum(-1, keepdim=True)
        token_T = torch.arange(len(tokens), device=tokens.device)
        balance = balancing_loss(probabilities_TE, token_T, expert_T2[:, 0], groups, self.balance_scope)

        second_T = torch.ones_like(token_T, dtype=torch.bool)
        if self.training:
            draw_T1 = uniform_noise(token_ids, groups, 1, key=int(self.key), step=int(self.step))
            second_T = 2 * gate_T2[:, 1] > draw_T1.squeeze(1)
        # All first choices, then the second ones that are asked: the order is the priority under a capacity.
        token_index = torch.cat([token_T, token_T[second_T]])
        expert_index = torch.cat([expert_T2[:, 0], expert_T2[second_T, 1]])
        weight = torch.cat([gate_T2[:, 0], gate_T2[second_T, 1]])
        group_demand = count_by_group(groups, self.num_experts, token_index, expert_index)

        capacity = None
        if self.capacity_factor is not None:
            slots = expert_capacity(groups, self.num_experts, 2, self.capacity_factor)
            kept, capacity = serve(groups, token_index, expert_index, slots, self.num_experts)
            token_index, expert_index, weight = token_index[kept], expert_index[kept], weight[kept]
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=weight,
            group_demand=group_demand,
            groups=groups,
            top_k=2,
            capacity=capacity,
            losses=balance.losses,
            step_losses=balance.step_losses,
            aux={"probabilities": probabilities_TE.detach(), "asked": 1 + second_T.long()},
        )
