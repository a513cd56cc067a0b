"""Balancing by binary integer programming (Sun 2025, arXiv 2502.15451).

Shapes: T tokens, D width, E experts, G routing groups, A assignments.
"""

import time
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.price_state import mean_of_prices, sum_of_prices
from lightning_base.routing.router import Router
from lightning_base.routing.selection import check_renormalize, full_precision, select_top_k

# What is closer than this is a tie: many times the rounding of float32, and no difference between experts.
GRID = 2.0**-20


class BIP(Router):
    """Each token goes to the k experts of its largest s - q, weighted by s, the softmax of its logits.

    In training, q are the prices of the routing group's own tokens after a few rounds of dual updates (``bip_prices``),
    so that the group is nearly balanced from the first step on, and a token's experts depend on later tokens of its
    group. They start from the prices carried from earlier steps, the mean over a step's groups, with which evaluation
    routes: there the router is causal.

    Args:
        num_experts: E.
        width: D.
        top_k: k.
        renormalize: a token's k gates sum to 1; the paper leaves them as they are.
        iterations: rounds of dual updates per training step, the paper's T.
    """

    causal = False
    refused_options: ClassVar[dict[str, str]] = {
        "capacity_factor": "its prices balance the experts without dropping any token",
        "bias_update_rate": "its prices solve a program anew at every step, which needs no rate",
    }
    prices: Tensor

    def __init__(
        self, *, num_experts: int, width: int, top_k: int = 2, renormalize: bool = False, iterations: int = 4
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
            logits_TE = nn.functional.linear(full_precision(tokens), full_precision(self.gate.weight))
        gates_TE = logits_TE.softmax(-1)
        detached_TE = gates_TE.detach()
        aux = {"scores": detached_TE, "probabilities": detached_TE}
        prices_GE = self.prices.to(logits_TE.dtype).expand(len(groups.sizes), -1)
        if self.training:
            prices_GE, aux["assignment_seconds"] = prices_by_group(
                detached_TE, groups, prices_GE, self.top_k, self.iterations
            )
            aux["group_prices"] = prices_GE
        # The token whose score became a price is tied between two experts. Rounded, it is so on every machine and in
        # every layout of ranks, where the last digits of its score would decide otherwise.
        ranking_TE = ((detached_TE - prices_GE[groups.index(tokens.device)]) / GRID).round()
        chosen = select_top_k(ranking_TE, gates_TE, self.top_k, self.renormalize)
        return RoutingPlan(
            token_index=chosen.token_index,
            expert_index=chosen.expert_index,
            weight=chosen.weight,
            group_demand=count_by_group(groups, self.num_experts, chosen.token_index, chosen.expert_index),
            groups=groups,
            top_k=self.top_k,
            aux=aux,
        )

    def step_sums(self, plan: RoutingPlan) -> dict[str, Tensor]:
        return sum_of_prices(plan)

    def end_step(self, sums: dict[str, Tensor]) -> None:
        if sums:
            self.prices.copy_(mean_of_prices(sums, self.prices))


# Groups differ in size from pass to pass, and the time is that of this part alone.
@torch.compiler.disable
def prices_by_group(
    scores_TE: Float[Tensor, "T E"], groups: RoutingGroups, start_GE: Float[Tensor, "G E"], top_k: int, iterations: int
) -> tuple[Float[Tensor, "G E"], Float64[Tensor, ""]]:
    """The prices of each routing group, and the seconds that all of them took."""
    began = time.perf_counter()
    solved = [
        bip_prices(group_TE, start_E, top_k, iterations)
        for group_TE, start_E in zip(groups.split(scores_TE), start_GE, strict=True)
    ]
    prices_GE = torch.stack(solved) if solved else start_GE
    return prices_GE, torch.tensor(time.perf_counter() - began, dtype=torch.float64)


def bip_prices(
    scores_TE: Float[Tensor, "T E"], prices_E: Float[Tensor, " E"], top_k: int, iterations: int
) -> Float[Tensor, " E"]:
    """Prices q after some rounds of dual updates (algorithm 1).

    The program maximises sum_te s_te x_te over x in {0, 1} with at most k experts per token and at most T k / E tokens
    per expert. Its relaxation has the dual min over p, q >= 0 of k sum_t p_t + (T k / E) sum_e q_e +
    sum_te max(0, s_te - p_t - q_e), descended in p and q by turns: p_t is the (k+1)-th largest s_te - q_e of the token,
    q_e the (T k / E + 1)-th largest s_te - p_t of the expert, neither below 0.

    Every q_e between that and the (T k / E)-th largest descends as far. The paper takes the lower end, which leaves the
    first token outside at a tie that rounding decides; here q_e is the middle, so that a group is routed the same
    whatever else was computed with it, and rounds come closer to the exact assignment.

    Args:
        scores_TE: [T, E].
        prices_E: [E], where to start.
        top_k: k.
        iterations: rounds.
    """
    num_tokens, num_experts = scores_TE.shape
    if top_k == num_experts or not num_tokens:
        return prices_E  # every token goes everywhere
    above = num_tokens * top_k // num_experts
    for _ in range(iterations):
        token_price_T1 = (scores_TE - prices_E).topk(top_k + 1, dim=1).values[:, -1:].clamp(min=0)
        edge_2E = (scores_TE - token_price_T1).topk(above + 1, dim=0).values[-2:]  # the last inside, the first outside
        prices_E = edge_2E.mean(0).clamp(min=0)
    return prices_E
