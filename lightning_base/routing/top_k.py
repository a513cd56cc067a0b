"""Top-k routing with a softmax gate (Shazeer et al. 2017, arXiv 1701.06538; as in Mixtral and OLMoE, arXiv 2409.02060)
or a sigmoid gate (DeepSeek-V3, arXiv 2412.19437).

Shapes: T tokens, D width, E experts, K experts per token.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_base.routing.capacity import check_capacity_factor, expert_capacity, serve
from lightning_base.routing.losses import balancing_loss, check_scope, router_z_loss
from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router
from lightning_base.routing.selection import full_precision

GATES = ("softmax", "sigmoid")


class TopK(Router):
    """Each token goes to the k experts of its largest logits.

    Args:
        num_experts: E.
        width: D.
        top_k: k.
        gate: ``softmax``, probabilities over all E experts, or ``sigmoid``, a score in (0, 1) for each expert by itself
            (DeepSeek-V3, eq. 13 to 15); there the balancing loss takes the scores divided by their sum over all E
            experts for probabilities (eq. 19).
        renormalize: gates of the k chosen sum to 1 (for softmax, a softmax over the chosen); otherwise they are the
            scores as they are. With k = 1 the gate would be a constant, so that the router could not learn: refused.
        capacity_factor: slots per expert, relative to an even share, in training and evaluation; None drops nothing.
            First choices are served before second choices, each in the order of the tokens, so that a token's second
            choice may lose its slot to a later token's first: with k > 1 and a capacity below E/k the router is not
            causal.
        z_loss: adds the router z-loss (Zoph et al. 2022, arXiv 2202.08906, eq. 5), with the paper's coefficient 0.001.
        balance_scope: over what the load-balancing loss is taken, see ``balancing_loss``.
    """

    loss_coefficients: ClassVar[dict[str, float]] = {"load_balancing_loss": 0.01}

    def __init__(
        self,
        *,
        num_experts: int,
        width: int,
        top_k: int = 2,
        gate: str = "softmax",
        renormalize: bool = True,
        capacity_factor: float | None = None,
        z_loss: bool = False,
        balance_scope: str = "group",
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        if gate not in GATES:
            raise ValueError(f"router.gate={gate}: choose one of {', '.join(GATES)}")
        if renormalize and top_k == 1:
            raise ValueError(
                "router.renormalize=true with router.top_k=1: the gate would always be 1 and the router could not "
                "learn; set router.renormalize=false"
            )
        if z_loss and gate == "sigmoid":
            raise ValueError(
                "router.z_loss=true with router.gate=sigmoid: the z-loss keeps the logsumexp of a softmax small, and "
                "this gate has no softmax; set router.z_loss=false or router.gate=softmax"
            )
        check_capacity_factor("capacity_factor", capacity_factor)
        check_scope(balance_scope)
        self.gate_function = gate
        self.renormalize = renormalize
        self.capacity_factor = capacity_factor
        self.z_loss = z_loss
        self.balance_scope = balance_scope
        if z_loss:
            self.loss_coefficients = {**type(self).loss_coefficients, "router_z_loss": 0.001}  # type: ignore[misc]
        # With a slot for every token of the group nothing is ever dropped.
        self.causal = capacity_factor is None or top_k == 1 or capacity_factor * top_k >= num_experts
        self.evaluation_modes = {"default": self.causal}
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.reset_parameters()

    @property
    def needs_sequences(self) -> bool:
        return self.balance_scope == "sequence"

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.gate.weight, std=(0.1 / self.gate.in_features) ** 0.5)

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        with torch.autocast(tokens.device.type, enabled=False):
            logits_TE = nn.functional.linear(full_precision(tokens), full_precision(self.gate.weight))
        # By logits: scores rise with them, and a sigmoid in float32 is exactly 1 for all logits above 17.
        expert_TK = logits_TE.topk(self.top_k, dim=-1).indices
        scores_TE, probabilities_TE = self._scores(logits_TE)
        weight_TK = scores_TE.gather(1, expert_TK)
        aux = {"probabilities": probabilities_TE.detach()}
        if self.gate_function == "sigmoid":
            aux["gates"] = weight_TK.detach().flatten()
        if self.renormalize:
            weight_TK = weight_TK / _positive(weight_TK.sum(-1, keepdim=True))
        # Choice-major order: all first choices come before any second one, which is the priority under a capacity.
        weight, expert_index = weight_TK.t().reshape(-1), expert_TK.t().reshape(-1)
        token_index = torch.arange(len(tokens), device=tokens.device).repeat(self.top_k)
        group_demand = count_by_group(groups, self.num_experts, token_index, expert_index)
        balance = balancing_loss(probabilities_TE, token_index, expert_index, groups, self.balance_scope)
        losses = (
            {**balance.losses, "router_z_loss": router_z_loss(logits_TE, groups)} if self.z_loss else balance.losses
        )

        capacity = None
        if self.capacity_factor is not None:
            slots = expert_capacity(groups, self.num_experts, self.top_k, self.capacity_factor)
            kept, capacity = serve(groups, token_index, expert_index, slots, self.num_experts)
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
            step_losses=balance.step_losses,
            aux=aux,
        )

    def _scores(self, logits_TE: Float[Tensor, "T E"]) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
        """What gates are made of, and probabilities that sum to 1 over all E experts."""
        if self.gate_function == "softmax":
            probabilities_TE = logits_TE.softmax(-1)
            return probabilities_TE, probabilities_TE
        scores_TE = logits_TE.sigmoid()
        return scores_TE, scores_TE / _positive(scores_TE.sum(-1, keepdim=True))


def _positive(sum_T1: Float[Tensor, "T 1"]) -> Float[Tensor, "T 1"]:
    """The same, or a tiny number where sigmoids have underflown to 0."""
    return sum_T1.clamp(min=1e-20)
