"""Routing gap: how many tokens go to other experts when the same batch is routed in another way.

Shapes: A assignments, T tokens.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_base.routing.plan import RoutingPlan


@dataclass(frozen=True)
class ExpertSets:
    """The experts of T tokens, without their order and their gates.

    Args:
        pairs: [A], sorted: token * E + expert, one number per assignment.
        num_tokens: T.
        num_experts: E.
    """

    pairs: Int64[Tensor, " A"]
    num_tokens: int
    num_experts: int


def expert_sets(plan: RoutingPlan) -> ExpertSets:
    """The expert sets of a plan, on the CPU, small enough to keep for a whole validation pass."""
    pairs = plan.token_index * plan.num_experts + plan.expert_index
    return ExpertSets(pairs.sort().values.cpu(), plan.num_tokens, plan.num_experts)


def tokens_that_differ(one: ExpertSets, other: ExpertSets) -> int:
    """How many tokens have another set of experts: ``routing_gap`` is this as a share of all tokens.

    Raises:
        ValueError: the sets are not about equally many tokens and experts.
    """
    if (one.num_tokens, one.num_experts) != (other.num_tokens, other.num_experts):
        raise ValueError(
            f"expert sets of {one.num_tokens} tokens and {one.num_experts} experts, and of {other.num_tokens} tokens "
            f"and {other.num_experts} experts: only sets of the same tokens can be compared"
        )
    pairs, times = torch.cat([one.pairs, other.pairs]).unique(return_counts=True)
    return len((pairs[times == 1] // one.num_experts).unique())
