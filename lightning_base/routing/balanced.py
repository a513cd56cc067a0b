"""BASE: balanced assignment of experts (Lewis et al. 2021, arXiv 2103.16716).

Shapes: T tokens, D width, E experts, K experts per token, G routing groups.
"""

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from lightning_base.assignment import SOLVERS, balanced_assignments
from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.price_state import mean_of_prices, sum_of_prices
from lightning_base.routing.router import Router
from lightning_base.routing.selection import full_precision, weigh

Gate = Literal["sigmoid", "centred_sigmoid", "twice_sigmoid", "softmax", "one"]
SOLVERS_FOR_TOP_K = ("transport", "greedy")  # the others give a token one expert


class BASE(Router):
    """Each expert gets the same number of tokens, such that the sum of the scores h_t . w_e is maximal (eq. 2).

    The assignment is made inside a routing group and without gradient; the centroids learn only through the gate
    sigmoid(h_t . w_a) (eq. 1). Balancing lets a token's expert depend on later tokens, so evaluation is greedy: the
    expert with the highest score. ``evaluation_mode = "balanced"`` shows what that choice costs or buys.

    With k > 1, which the paper does not have, every token gets k different experts, every expert T k / E tokens, and
    every assignment its own sigmoid; greedy are the k highest scores.

    The prices [E] that solve a step's assignments start the solver in the next step: a buffer, the mean over the step's
    routing groups. They save time and change no optimum.

    Args:
        num_experts: E.
        width: D.
        solver: how the assignment is solved, a name in ``lightning_base.assignment.SOLVERS``.
        top_k: k; more than 1 only with a solver that can, transport or greedy.
        gate: what an expert's output is weighted by. ``sigmoid`` of the score is the paper's and near one half at
            first. ``centred_sigmoid`` takes each token's mean score off before, so that centroids cannot learn what is
            common to all. ``twice_sigmoid`` is near one; ``softmax`` is the share among all scores; ``one`` is no gate,
            so that the centroids stay as they were drawn.
    """

    causal = False
    prices: Tensor
    evaluation_modes: Mapping[str, bool] = MappingProxyType({"greedy": True, "balanced": False})
    refused_options: ClassVar[dict[str, str]] = {
        "capacity_factor": "balanced assignment gives every expert exactly its share, so that nothing is dropped",
        "renormalize": "its gate is a sigmoid of each score by itself, and with one expert would always be 1",
    }

    def __init__(
        self,
        *,
        num_experts: int,
        width: int,
        solver: str = "transport",
        top_k: int = 1,
        gate: str = "sigmoid",
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        if solver not in SOLVERS:
            raise ValueError(f"router.solver={solver}: choose one of {', '.join(sorted(SOLVERS))}")
        if top_k > 1 and solver not in SOLVERS_FOR_TOP_K:
            raise ValueError(
                f"router.top_k={top_k} with router.solver={solver}: this solver gives each token one expert; "
                f"choose router.solver={' or '.join(SOLVERS_FOR_TOP_K)}"
            )
        check_orthogonal(num_experts, width, "BASE")
        if gate not in get_args(Gate):
            raise ValueError(f"router.gate={gate}: choose one of {', '.join(get_args(Gate))}")
        self.solver, self.gate = solver, gate
        if solver == "greedy":
            # The best expert of each token by itself: nothing is balanced, and nothing looks ahead.
            self.causal, self.evaluation_modes = True, {"greedy": True, "balanced": True}
        self.centroids = nn.Parameter(torch.empty(num_experts, width), requires_grad=gate != "one")
        self.register_buffer("prices", torch.zeros(num_experts, dtype=torch.float64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.centroids, gain=0.1)

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        with torch.autocast(tokens.device.type, enabled=False):
            scores_TE = nn.functional.linear(full_precision(tokens), full_precision(self.centroids))
        detached_TE = scores_TE.detach()
        # ``self.training`` decides, not whether gradients are on: a frozen layer in training still balances.
        aux = {"scores": detached_TE}
        balances = self.training or self.evaluation_mode == "balanced"
        if balances:
            expert_TK, aux["group_prices"], aux["assignment_seconds"] = balanced_by_group(
                detached_TE,
                groups,
                self.solver,
                self.top_k,
                self.prices.double(),  # a model in half precision has halved them too
            )
        else:
            expert_TK = detached_TE.topk(self.top_k, dim=-1).indices
        gates_TE = self.gates(scores_TE)
        chosen = weigh(expert_TK, gates_TE)
        if self.gate == "sigmoid":
            aux["gates"] = chosen.weight.detach()
        elif self.gate == "softmax":
            aux["probabilities"] = gates_TE.detach()
        return RoutingPlan(
            token_index=chosen.token_index,
            expert_index=chosen.expert_index,
            weight=chosen.weight,
            group_demand=count_by_group(groups, self.num_experts, chosen.token_index, chosen.expert_index),
            groups=groups,
            top_k=self.top_k,
            equal_loads=balances and self.solver != "greedy" and groups.even_over(self.num_experts, self.top_k),
            aux=aux,
        )

    def gates(self, scores_TE: Tensor) -> Tensor:
        """What each expert would weigh for each token, [T, E]."""
        if self.gate == "softmax":
            return scores_TE.softmax(-1)
        if self.gate == "one":
            return torch.ones_like(scores_TE)
        if self.gate == "centred_sigmoid":
            return (scores_TE - scores_TE.mean(-1, keepdim=True)).sigmoid()
        return scores_TE.sigmoid() * (2 if self.gate == "twice_sigmoid" else 1)

    def step_sums(self, plan: RoutingPlan) -> dict[str, Tensor]:
        return sum_of_prices(plan)

    def end_step(self, sums: dict[str, Tensor]) -> None:
        if sums:
            self.prices.copy_(mean_of_prices(sums, self.prices))


def check_orthogonal(num_experts: int, width: int, router: str) -> None:
    """Raises ValueError if ``num_experts`` centroids of ``width`` cannot be orthogonal."""
    if num_experts > width:
        raise ValueError(
            f"router.num_experts={num_experts} exceeds model.width={width}: "
            f"{router} starts from orthogonal centroids, of which there are at most as many as dimensions"
        )


# The solvers are Numba and numpy code, which torch.compile would try to trace and fail.
@torch.compiler.disable
def balanced_by_group(
    scores_TE: Float[Tensor, "T E"], groups: RoutingGroups, solver: str, top_k: int, start_E: Float64[Tensor, " E"]
) -> tuple[Int64[Tensor, "T K"], Float64[Tensor, "G E"], Float64[Tensor, ""]]:
    """The k experts of every token, balanced in each routing group, the prices of each group, and the seconds taken."""
    began = time.perf_counter()
    # Every group starts from the same prices, not from its neighbour's: which groups share a rank must not matter.
    solved = balanced_assignments(groups.split(scores_TE), solver=solver, prices=start_E, k=top_k)
    experts = [answer.expert.view(-1, top_k) for answer in solved]
    expert_TK = torch.cat([scores_TE.new_zeros(0, top_k, dtype=torch.int64), *experts])
    prices_GE = torch.stack([answer.prices for answer in solved]) if solved else start_E.new_zeros(0, len(start_E))
    return expert_TK, prices_GE, torch.tensor(time.perf_counter() - began, dtype=torch.float64)
