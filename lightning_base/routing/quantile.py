"""Quantile balancing (Su 2026, https://kexue.fm/archives/11619; in Megatron-LM and torchtitan since that year).

Shapes: T tokens, D width, E experts, A assignments.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router
from lightning_base.routing.selection import check_renormalize, full_precision, select_top_k


class Quantile(Router):
    """Each token goes to the k experts of its largest s - beta, weighted by s = sigmoid(logit).

    beta are the prices of the balanced assignment of the last step's tokens, one quantile per expert: see
    ``quantile_prices``. Unlike loss-free balancing there is no rate to choose, and unlike BASE a token's expert never
    depends on the tokens beside it, in training or evaluation, because prices come from earlier steps. So the loads are
    nearly, not exactly, balanced: they are those of new tokens under old prices.

    Args:
        num_experts: E.
        width: D.
        top_k: k.
        renormalize: a token's k gates sum to 1.
        iterations: rounds of coordinate descent per step, from the prices of the step before.
    """

    refused_options: ClassVar[dict[str, str]] = {
        "capacity_factor": "its prices balance the experts without dropping any token",
        "bias_update_rate": "its prices are quantiles of the scores, which need no rate",
    }
    prices: Tensor

    def __init__(
        self, *, num_experts: int, width: int, top_k: int = 2, renormalize: bool = False, iterations: int = 1
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        check_renormalize(renormalize, top_k)
        if iterations < 1:
            raise ValueError(f"router.iterations={iterations}: prices need at least 1 round per step")
        self.renormalize = renormalize
        self.iterations = iterations
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.register_buffer("prices", torch.zeros(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.gate.weight, std=(0.1 / self.gate.in_features) ** 0.5)

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        with torch.autocast(tokens.device.type, enabled=False):
            gates_TE = nn.functional.linear(full_precision(tokens), full_precision(self.gate.weight)).sigmoid()
        detached_TE = gates_TE.detach()
        chosen = select_top_k(detached_TE - self.prices.to(detached_TE.dtype), gates_TE, self.top_k, self.renormalize)
        return RoutingPlan(
            token_index=chosen.token_index,
            expert_index=chosen.expert_index,
            weight=chosen.weight,
            group_demand=count_by_group(groups, self.num_experts, chosen.token_index, chosen.expert_index),
            groups=groups,
            top_k=self.top_k,
            aux={"scores": detached_TE, "gates": detached_TE[chosen.token_index, chosen.expert_index]},
        )

    def step_sums(self, plan: RoutingPlan) -> dict[str, Tensor]:
        # Every group starts from the prices of the last step: which groups share a rank must not matter.
        prices = [
            quantile_prices(group_TE, self.prices.to(group_TE.dtype), self.top_k, self.iterations).double()
            for group_TE in plan.groups.split(plan.aux["scores"])
            if len(group_TE)
        ]
        total = torch.stack(prices).sum(0) if prices else torch.zeros_like(self.prices, dtype=torch.float64)
        return {"prices": total, "groups": total.new_tensor(len(prices))}

    def end_step(self, sums: dict[str, Tensor]) -> None:
        if float(sums.get("groups", torch.zeros(()))):
            self.prices.copy_(sums["prices"] / sums["groups"])


def quantile_prices(
    scores_TE: Float[Tensor, "T E"], prices_E: Float[Tensor, " E"], top_k: int, iterations: int
) -> Float[Tensor, " E"]:
    """Prices, mean 0, after some rounds of coordinate descent on the dual of balanced assignment.

    The dual is min over alpha, beta of k sum_t alpha_t + (T k / E) sum_e beta_e + sum_te max(0, s_te - alpha_t -
    beta_e). With beta held, alpha_t is the (k+1)-th largest s_te - beta_e of the token: what an expert must offer it to
    be among its k. With alpha held, beta_e is the (T k / E + 1)-th largest s_te - alpha_t of the expert, which leaves
    exactly T k / E tokens above it. (Where T k / E is not whole it is rounded down.)

    The thresholds alpha are those of the published method. The price at which expert e alone would be balanced, the
    others' prices held, would need the k-th largest of the *other* experts instead; updated all at once, such prices
    overshoot: with two experts they swap for ever.

    Args:
        scores_TE: [T, E], T at least 1.
        prices_E: [E], where to start.
        top_k: k.
        iterations: rounds.
    """
    num_tokens, num_experts = scores_TE.shape
    if top_k == num_experts:
        return prices_E  # every token goes everywhere
    above = num_tokens * top_k // num_experts
    for _ in range(iterations):
        threshold_T1 = (scores_TE - prices_E).topk(top_k + 1, dim=1).values[:, -1:]
        prices_E = (scores_TE - threshold_T1).kthvalue(num_tokens - above, dim=0).values
    return prices_E - prices_E.mean()
