"""S-BASE: balanced assignment relaxed by entropy (Clark et al. 2022, arXiv 2202.01169).

Shapes: T tokens, D width, E experts, G routing groups.
"""

import math
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from lightning_base.routing.balanced import check_orthogonal
from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router
from lightning_base.routing.selection import full_precision, select_top_k


class Sinkhorn(Router):
    """Each token goes to the k experts of its largest entry in the Sinkhorn plan of its routing group.

    The plan P has rows that sum to 1 and columns that sum to T / E, and maximises sum_te P_te s_te + temperature *
    entropy(P), with the scores s = h_t . w_e of BASE and no gradient. The *plan* is balanced, its largest entries are
    not: unlike BASE, loads are only roughly even, and worst where tokens repeat. Gates are as in Megatron-LM:
    sigmoid(s) for k = 1, softmax(s) over all experts for k > 1; the centroids learn through them alone. The plan sees
    later tokens, so evaluation is greedy: the experts with the highest scores.

    Args:
        num_experts: E.
        width: D.
        top_k: k.
        temperature: weight of the entropy; towards 0 the plan becomes BASE's assignment.
        iterations: the most normalizations of rows and columns.
        tolerance: stop when no column sum is off by more than this share.
    """

    causal = False
    evaluation_modes: Mapping[str, bool] = MappingProxyType({"greedy": True, "balanced": False})
    refused_options: ClassVar[dict[str, str]] = {
        "solver": "it relaxes the assignment instead of solving it; router=base takes router.solver",
    }

    def __init__(
        self,
        *,
        num_experts: int,
        width: int,
        top_k: int = 1,
        temperature: float = 1.0,
        iterations: int = 100,
        tolerance: float = 1e-4,
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        check_orthogonal(num_experts, width, "Sinkhorn")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"router.temperature={temperature}: a temperature is a number above 0")
        if iterations < 1:
            raise ValueError(f"router.iterations={iterations}: a plan needs at least 1 iteration")
        if not tolerance >= 0:
            raise ValueError(f"router.tolerance={tolerance}: a tolerance is a number of at least 0")
        self.temperature, self.iterations, self.tolerance = temperature, iterations, tolerance
        self.centroids = nn.Parameter(torch.empty(num_experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.centroids, gain=0.1)

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        with torch.autocast(tokens.device.type, enabled=False):
            scores_TE = nn.functional.linear(full_precision(tokens), full_precision(self.centroids))
        detached_TE = scores_TE.detach()
        ranking_TE, aux = detached_TE, {"scores": detached_TE}
        if self.training or self.evaluation_mode == "balanced":
            ranking_TE, aux["assignment_seconds"] = log_plan_by_group(
                detached_TE / self.temperature, groups, self.iterations, self.tolerance
            )
        gates_TE = scores_TE.sigmoid() if self.top_k == 1 else scores_TE.softmax(-1)
        chosen = select_top_k(ranking_TE, gates_TE, self.top_k)
        if self.top_k == 1:
            aux["gates"] = chosen.weight.detach()
        else:
            aux["probabilities"] = gates_TE.detach()
        return RoutingPlan(
            token_index=chosen.token_index,
            expert_index=chosen.expert_index,
            weight=chosen.weight,
            group_demand=count_by_group(groups, self.num_experts, chosen.token_index, chosen.expert_index),
            groups=groups,
            top_k=self.top_k,
            aux=aux,
        )


# How often it goes round depends on the numbers, which torch.compile cannot trace.
@torch.compiler.disable
def log_plan_by_group(
    logits_TE: Float[Tensor, "T E"], groups: RoutingGroups, iterations: int, tolerance: float
) -> tuple[Float[Tensor, "T E"], Float64[Tensor, ""]]:
    """The logarithm of the plan of each routing group, and the seconds that all of them took."""
    began = time.perf_counter()
    plans = [sinkhorn_log_plan(group_TE, iterations, tolerance) for group_TE in groups.split(logits_TE)]
    log_plan_TE = torch.cat([logits_TE[:0], *plans])
    return log_plan_TE, torch.tensor(time.perf_counter() - began, dtype=torch.float64)


def sinkhorn_log_plan(logits_TE: Float[Tensor, "T E"], iterations: int, tolerance: float) -> Float[Tensor, "T E"]:
    """The logarithm of the plan with row sums 1 and column sums near T / E that Sinkhorn's iteration reaches from
    exp(logits) (Cuturi 2013, arXiv 1306.0895), in the log domain so that nothing overflows.

    Args:
        logits_TE: [T, E].
        iterations: the most normalizations of columns.
        tolerance: stop when no column sum is off by more than this share.
    """
    num_tokens, num_experts = logits_TE.shape
    log_plan_TE = logits_TE.log_softmax(1)
    if not num_tokens:
        return log_plan_TE
    for _ in range(iterations):
        excess_E = log_plan_TE.logsumexp(0) - math.log(num_tokens / num_experts)
        if float(excess_E.abs().max()) <= tolerance:
            break
        log_plan_TE = (log_plan_TE - excess_E).log_softmax(1)
    return log_plan_TE
