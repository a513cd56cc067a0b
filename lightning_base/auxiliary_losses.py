"""From the plans of the layers to the auxiliary losses of the model.

Shapes: E experts.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_base.instantiation import did_you_mean
from lightning_base.routing.losses import finish_step_loss
from lightning_base.routing.plan import RoutingPlan

# For each layer and loss, the demand [E] of each expert and the number of tokens, in one tensor [E + 1].
StepCounts = dict[tuple[str, str], Int64[Tensor, " _"]]


def step_counts(plans: Mapping[str, RoutingPlan]) -> StepCounts:
    """What one forward pass adds to the counts that losses over the whole optimizer step are built from."""
    return {
        (layer, name): torch.cat([part.demand, part.demand.new_tensor([part.num_tokens])])
        for layer, plan in plans.items()
        for name, part in plan.step_losses.items()
    }


def auxiliary_losses(
    plans: Mapping[str, RoutingPlan], coefficients: Mapping[str, float], counts: StepCounts, parts: int
) -> dict[str, Tensor]:
    """Each auxiliary loss averaged over layers, so that its coefficient means the same at any depth.

    Args:
        plans: of one forward pass.
        coefficients: by loss; only their names matter here.
        counts: of the whole step, over all its forward passes on all ranks.
        parts: how many forward passes make the step; their losses are averaged later, so that what one pass adds to a
            sum over the step counts ``parts`` times.

    Raises:
        KeyError: a loss without a coefficient.
    """
    by_name: dict[str, list[Tensor]] = {}
    for layer, plan in plans.items():
        found = dict(plan.losses)
        for name, part in plan.step_losses.items():
            total = counts[layer, name]
            found[name] = parts * finish_step_loss(part, total[:-1], total[-1])
        for name, loss in found.items():
            if name not in coefficients:
                raise KeyError(
                    f"the router returns {name}, which has no coefficient: set module.loss_coefficients.{name}"
                    f"{did_you_mean(name, coefficients)}"
                )
            by_name.setdefault(name, []).append(loss)
    return {name: torch.stack(losses).mean() for name, losses in by_name.items()}
