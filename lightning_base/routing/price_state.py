"""Prices that a router carries from step to step: the mean over the routing groups of the step before.

Neither function looks at a number on the device, which on a GPU would make the host wait.

Shapes: E experts, G routing groups.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_base.routing.plan import RoutingPlan


def sum_of_prices(plan: RoutingPlan) -> dict[str, Tensor]:
    """The sum of the prices of all groups that hold tokens, and how many these are."""
    prices_GE = plan.aux["group_prices"].double()
    held = [group for group, size in enumerate(plan.groups.sizes) if size > 0]
    if len(held) < len(prices_GE):
        prices_GE = prices_GE[held]
    return {"prices": prices_GE.sum(0), "groups": prices_GE.new_full((), len(held))}


def mean_of_prices(sums: Mapping[str, Tensor], before_E: Float[Tensor, " E"]) -> Float[Tensor, " E"]:
    """The mean, given the sums over the whole step; the prices before if no group held a token."""
    groups = sums["groups"]
    return torch.where(groups > 0, sums["prices"] / groups.clamp(min=1), before_E)
