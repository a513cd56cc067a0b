"""BASE: balanced assignment of experts (Lewis et al. 2021, arXiv 2103.16716).

Shapes: T tokens, D width, E experts.
"""

import time
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from lightning_base.assignment import SOLVERS, balanced_assignment
from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router


class BASE(Router):
    """Each expert gets the same number of tokens, such that the sum of the scores h_t . w_e is maximal (eq. 2).

    The assignment is made inside a routing group and without gradient; the centroids learn only through the gate
    sigmoid(h_t . w_a) (eq. 1). Balancing lets a token's expert depend on later tokens, so evaluation is greedy: the
    expert with the highest score. ``evaluation_mode = "balanced"`` shows what that choice costs or buys.

    The prices [E] that solve a step's assignments start the solver in the next step: a buffer, the mean over the step's
    routing groups. They save time and change no optimum.

    Args:
        num_experts: E.
        width: D.
        solver: how the assignment is solved, a name in ``lightning_base.assignment.SOLVERS``.
    """

    causal = False
    prices: Tensor
    evaluation_modes: ClassVar[tuple[str, ...]] = ("greedy", "balanced")

    def __init__(self, *, num_experts: int, width: int, solver: str = "transport") -> None:
        super().__init__(num_experts=num_experts)
        if solver not in SOLVERS:
            raise ValueError(f"router.solver={solver}: choose one of {', '.join(sorted(SOLVERS))}")
        if num_experts > width:
            raise ValueError(
                f"router.num_experts={num_experts} exceeds model.width={width}: "
                "BASE starts from orthogonal centroids, of which there are at most as many as dimensions"
            )
        self.solver = solver
        self.centroids = nn.Parameter(torch.empty(num_experts, width))
        self.register_buffer("prices", torch.zeros(num_experts, dtype=torch.float64))

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.centroids, gain=0.1)

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        with torch.autocast(tokens.device.type, enabled=False):
            scores_TE = nn.functional.linear(tokens.float(), self.centroids.float())
        detached_TE = scores_TE.detach()
        # ``self.training`` decides, not whether gradients are on: a frozen layer in training still balances.
        aux = {"scores": detached_TE}
        if self.training or self.evaluation_mode == "balanced":
            expert_index, aux["group_prices"], aux["solve_seconds"] = balanced_by_group(
                detached_TE,
                groups,
                self.solver,
                self.prices.double(),  # a model in half precision has halved them too
            )
        else:
            expert_index = detached_TE.argmax(-1)
        token_index = torch.arange(len(tokens), device=tokens.device)
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=torch.sigmoid(scores_TE.gather(1, expert_index[:, None]).squeeze(1)),
            group_demand=count_by_group(groups, self.num_experts, token_index, expert_index),
            groups=groups,
            aux=aux,
        )

    def step_sums(self, plan: RoutingPlan) -> dict[str, Tensor]:
        held = torch.tensor([size > 0 for size in plan.groups.sizes], device=self.prices.device)
        return {"prices": plan.aux["group_prices"][held].sum(0), "groups": held.sum().double()}

    def end_step(self, sums: dict[str, Tensor]) -> None:
        if float(sums["groups"]):
            self.prices.copy_(sums["prices"] / sums["groups"])


# The solvers are Numba and numpy code, which torch.compile would try to trace and fail.
@torch.compiler.disable
def balanced_by_group(
    scores_TE: Float[Tensor, "T E"], groups: RoutingGroups, solver: str, start_E: Float64[Tensor, " E"]
) -> tuple[Int64[Tensor, " T"], Float64[Tensor, "G E"], Float64[Tensor, ""]]:
    """The expert of every token, balanced in each routing group, the prices of each group, and the seconds taken."""
    began = time.perf_counter()
    # Every group starts from the same prices, not from its neighbour's: which groups share a rank must not matter.
    solved = [balanced_assignment(group_TE, solver=solver, prices=start_E) for group_TE in groups.split(scores_TE)]
    expert_T = torch.cat([scores_TE.new_zeros(0, dtype=torch.int64), *(answer.expert for answer in solved)])
    prices_GE = torch.stack([answer.prices for answer in solved]) if solved else start_E.new_zeros(0, len(start_E))
    return expert_T, prices_GE, torch.tensor(time.perf_counter() - began, dtype=torch.float64)
