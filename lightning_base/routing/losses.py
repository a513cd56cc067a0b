"""Auxiliary losses of routers, computed per routing group and averaged over groups, or over a whole optimizer step.

Shapes: A assignments asked for, T tokens, G routing groups, E experts.
"""

from typing import Literal, NamedTuple, get_args

from jaxtyping import Float, Int64
from torch import Tensor

from lightning_base.routing.plan import RoutingGroups, StepLoss, count, count_by_group

Scope = Literal["group", "sequence", "step"]


class BalancingLoss(NamedTuple):
    """The load-balancing loss of a forward pass as a plan holds it: in one of the two, by its scope."""

    losses: dict[str, Tensor]
    step_losses: dict[str, StepLoss]


def check_scope(scope: str) -> None:
    """Raises ValueError unless ``scope`` is one that ``balancing_loss`` knows."""
    if scope not in get_args(Scope):
        raise ValueError(f"router.balance_scope={scope}: choose one of {', '.join(get_args(Scope))}")


def balancing_loss(
    probabilities_TE: Float[Tensor, "T E"],
    token_index: Int64[Tensor, " A"],
    expert_index: Int64[Tensor, " A"],
    groups: RoutingGroups,
    scope: str = "group",
) -> BalancingLoss:
    """``load_balancing_loss`` over the scope a router was given.

    Args:
        probabilities_TE: [T, E], gate probabilities of every token.
        token_index: [A], which token asked, before any drop.
        expert_index: [A], for which expert.
        groups: the routing groups of the T tokens.
        scope: ``group``, a routing group, as in Switch and GShard, which balance what one device holds; ``sequence``,
            each sequence by itself (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20); ``step``, all tokens of an optimizer
            step, of all ranks and micro batches (Qiu et al. 2025, arXiv 2501.11873), which leaves experts free to
            specialise on single sequences.
    """
    num_experts = probabilities_TE.shape[1]
    if scope == "step":
        demand = count(expert_index, num_experts)
        step_loss = StepLoss(demand, probabilities_TE.sum(0), len(probabilities_TE))
        return BalancingLoss({}, {"load_balancing_loss": step_loss})
    balanced = groups.by_sequence() if scope == "sequence" else groups
    demand_GE = count_by_group(balanced, num_experts, token_index, expert_index)
    return BalancingLoss({"load_balancing_loss": load_balancing_loss(probabilities_TE, demand_GE, balanced)}, {})


def finish_step_loss(
    part: StepLoss, step_demand: Int64[Tensor, " E"], step_tokens: int | Int64[Tensor, ""]
) -> Float[Tensor, ""]:
    """What this forward pass adds to E sum_i f_i P_i over the step; the parts of a step sum to its loss.

    The loss is linear in P, and P is the sum of the parts' P, so the gradients of the parts sum to the gradient of the
    whole, however the step is cut.

    Args:
        part: of this forward pass.
        step_demand: [E], summed over the step.
        step_tokens: tokens of the step.
    """
    share_E = step_demand / step_demand.sum().clamp(min=1)
    return len(share_E) * (share_E * part.probability_sum).sum() / step_tokens


def router_z_loss(logits_TE: Float[Tensor, "T E"], groups: RoutingGroups) -> Float[Tensor, ""]:
    """Mean over tokens of (logsumexp of the logits)^2, which keeps logits small (Zoph et al. 2022, arXiv 2202.08906).

    Averaged in each group and then over groups that hold tokens.
    """
    return _means(logits_TE.logsumexp(-1, keepdim=True).square(), groups).sum() / max(groups.held, 1)


def _means(value_TN: Float[Tensor, "T N"], groups: RoutingGroups) -> Float[Tensor, "G N"]:
    """The mean over the tokens of each group, 0 for a group without tokens."""
    sums_GN = groups.sum(value_TN)
    if groups.even:
        return sums_GN / max(groups.sizes[0] if groups.sizes else 1, 1)
    return sums_GN / sums_GN.new_tensor(groups.sizes).clamp(min=1)[:, None]


def load_balancing_loss(
    probabilities_TE: Float[Tensor, "T E"],
    group_demand_GE: Int64[Tensor, "G E"],
    groups: RoutingGroups,
) -> Float[Tensor, ""]:
    """E sum_i f_i P_i, which is 1 under uniform routing (Fedus et al. 2021, eq. 4 to 6).

    f_i is the share of assignments that asked for expert i (before any drop, divided by T k), P_i its mean gate
    probability; the gradient flows through P alone, since f is built from counts. Groups without tokens are left out.
    """
    asked_G = group_demand_GE.sum(1, keepdim=True).clamp(min=1)
    share_GE = group_demand_GE / asked_G
    loss_G = group_demand_GE.shape[1] * (share_GE * _means(probabilities_TE, groups)).sum(1)
    return loss_G.sum() / max(groups.held, 1)
