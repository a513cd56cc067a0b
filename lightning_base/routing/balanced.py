"""BASE: balanced assignment of experts (Lewis et al. 2021, arXiv 2103.16716).

Shapes: T tokens, D width, E experts.
"""

from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lightning_base.assignment import SOLVERS, balanced_assignment
from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router


class BASE(Router):
    """Each expert gets the same number of tokens, such that the sum of the scores h_t . w_e is maximal (eq. 2).

    The assignment is made inside a routing group and without gradient; the centroids learn only through the gate
    sigmoid(h_t . w_a) (eq. 1). Balancing lets a token's expert depend on later tokens, so evaluation is greedy: the
    expert with the highest score. ``evaluation_mode = "balanced"`` shows what that choice costs or buys.

    Args:
        num_experts: E.
        width: D.
        solver: how the assignment is solved, a name in ``lightning_base.assignment.SOLVERS``.
    """

    causal = False
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

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.centroids, gain=0.1)

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        with torch.autocast(tokens.device.type, enabled=False):
            scores_TE = nn.functional.linear(tokens.float(), self.centroids.float())
        detached_TE = scores_TE.detach()
        # ``self.training`` decides, not whether gradients are on: a frozen layer in training still balances.
        if self.training or self.evaluation_mode == "balanced":
            expert_index = balanced_by_group(detached_TE, groups, self.solver)
        else:
            expert_index = detached_TE.argmax(-1)
        token_index = torch.arange(len(tokens), device=tokens.device)
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=torch.sigmoid(scores_TE.gather(1, expert_index[:, None]).squeeze(1)),
            group_demand=count_by_group(groups, self.num_experts, token_index, expert_index),
            groups=groups,
        )


# The solvers are Numba and numpy code, which torch.compile would try to trace and fail.
@torch.compiler.disable
def balanced_by_group(scores_TE: Float[Tensor, "T E"], groups: RoutingGroups, solver: str) -> Int64[Tensor, " T"]:
    """The expert of every token, balanced inside each routing group, [T]."""
    experts = [balanced_assignment(group_TE, solver=solver).expert for group_TE in groups.split(scores_TE)]
    return torch.cat([scores_TE.new_zeros(0, dtype=torch.int64), *experts])
