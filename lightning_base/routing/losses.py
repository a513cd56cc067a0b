"""Auxiliary losses of routers, computed per routing group and averaged over groups.

Shapes: T tokens, G routing groups, E experts.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_base.routing.plan import RoutingGroups


def load_balancing_loss(
    probabilities_TE: Float[Tensor, "T E"],
    group_demand_GE: Int64[Tensor, "G E"],
    groups: RoutingGroups,
) -> Float[Tensor, ""]:
    """E sum_i f_i P_i, which is 1 under uniform routing (Fedus et al. 2021, eq. 4 to 6).

    f_i is the share of assignments that asked for expert i (before any drop, divided by T k), P_i its mean gate
    probability; the gradient flows through P alone, since f is built from counts. Groups without tokens are left out.
    """
    num_groups, num_experts = group_demand_GE.shape
    sums_GE = probabilities_TE.new_zeros(num_groups, num_experts)
    sums_GE = sums_GE.index_add(0, groups.index(probabilities_TE.device), probabilities_TE)
    sizes_G = torch.tensor(groups.sizes, device=sums_GE.device, dtype=sums_GE.dtype)
    mean_GE = sums_GE / sizes_G.clamp(min=1)[:, None]
    asked_G = group_demand_GE.sum(1, keepdim=True).clamp(min=1)
    share_GE = group_demand_GE / asked_G
    loss_G = num_experts * (share_GE * mean_GE).sum(1)
    return loss_G.sum() / (sizes_G > 0).sum().clamp(min=1)
