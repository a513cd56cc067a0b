"""Causal leak: what earlier tokens hear of later ones, through the router alone.

Shapes: T tokens, D width, E experts, A assignments, G routing groups, N bins.
"""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lightning_base.routing.plan import RoutingGroups, RoutingPlan
from lightning_base.routing.router import Router

# Gates are computed in float32: a difference below this is rounding, not a decision.
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-4, 1e-6


@dataclass(frozen=True)
class Changes:
    """Which tokens a router treats differently in two plans for the same tokens.

    Args:
        expert: [T], the token asks for other experts.
        weight: [T], the gate of an expert that it has in both plans is another.
        drop: [T], it keeps fewer or more of the experts it asked for.
    """

    expert: Bool[Tensor, " T"]
    weight: Bool[Tensor, " T"]
    drop: Bool[Tensor, " T"]

    def counts(self, of_T: Bool[Tensor, " T"]) -> dict[str, int]:
        """How many of the tokens ``of_T`` change in each way, in ``any`` of them, and how many ``tokens`` there are."""
        some_T = self.expert | self.weight | self.drop
        ways = {"expert": self.expert, "weight": self.weight, "drop": self.drop, "any": some_T, "tokens": of_T}
        return {way: int((changed_T & of_T).sum()) for way, changed_T in ways.items()}


def changes(one: RoutingPlan, other: RoutingPlan) -> Changes:
    """What differs between two plans for the same T tokens.

    A plan lists what was kept. Where something was dropped, a token may have asked for the same experts both times and
    kept different ones: that is a change of the drop as long as both plans together give it at most k experts, and a
    change of the expert beyond.

    Raises:
        ValueError: the plans are not about equally many tokens and experts.
    """
    if (one.num_tokens, one.num_experts) != (other.num_tokens, other.num_experts):
        raise ValueError(
            f"plans of {one.num_tokens} tokens and {one.num_experts} experts, and of {other.num_tokens} tokens and "
            f"{other.num_experts} experts: only plans for the same tokens can be compared"
        )
    (kept_TE, weight_TE), (other_kept_TE, other_weight_TE) = _table(one), _table(other)
    differ_T = (kept_TE != other_kept_TE).any(1)
    both_TE = kept_TE & other_kept_TE
    close_TE = torch.isclose(weight_TE, other_weight_TE, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE)
    if all(len(plan.token_index) == int(plan.asked) for plan in (one, other)):
        # Nothing was dropped for want of a slot; a token may still be left without any expert, as by expert choice.
        expert_T, drop_T = differ_T, kept_TE.any(1) != other_kept_TE.any(1)
    else:
        explained_T = (kept_TE | other_kept_TE).sum(1) <= one.top_k
        expert_T = differ_T & ~explained_T
        drop_T = differ_T & (explained_T | (kept_TE.sum(1) != other_kept_TE.sum(1)))
    return Changes(expert=expert_T, weight=(both_TE & ~close_TE).any(1), drop=drop_T)


def causal_leak(
    router: Router,
    tokens_TD: Float[Tensor, "T D"],
    token_ids_T: Int64[Tensor, " T"],
    other_tokens_TD: Float[Tensor, "T D"],
    other_ids_T: Int64[Tensor, " T"],
    groups: RoutingGroups,
    *,
    training: bool,
) -> dict[str, int]:
    """Counts the earlier tokens whose routing changes when only later tokens of their routing group change.

    Each group is cut in the middle. What lies before is kept and counted; what lies after is replaced by other text.
    The router's own inputs are given, so that nothing but this router can leak. A copy of it routes, without gradient:
    neither its state nor its mode changes.

    Args:
        router: as it stands, in its present evaluation mode.
        tokens_TD: [T, D], router inputs.
        token_ids_T: [T].
        other_tokens_TD: [T, D], router inputs of another text; position t may replace position t.
        other_ids_T: [T].
        groups: of the T tokens.
        training: whether to route as in training, or as in evaluation.

    Returns:
        Counts of tokens: ``expert``, ``weight``, ``drop`` (see ``changes``), ``any`` of the three, and ``tokens``, how
        many earlier tokens there were.
    """
    copied = copy.deepcopy(router).train(training)
    earlier_T = before_the_cut(groups, tokens_TD.device)
    mixed_TD = torch.where(earlier_T[:, None], tokens_TD, other_tokens_TD)
    mixed_ids_T = torch.where(earlier_T, token_ids_T, other_ids_T)
    with torch.no_grad():
        before = copied(tokens_TD, token_ids_T, groups)
        after = copied(mixed_TD, mixed_ids_T, groups)
    return changes(before, after).counts(earlier_T)


def before_the_cut(groups: RoutingGroups, device: torch.device | str = "cpu") -> Bool[Tensor, " T"]:
    """[T], True in the first half of each group; the middle token of an odd group is in the second."""
    index_T = groups.index(device)
    return position_in_group(groups, device) < _sizes(groups, device)[index_T] // 2


def position_in_group(groups: RoutingGroups, device: torch.device | str = "cpu") -> Int64[Tensor, " T"]:
    """[T], how many tokens of its group come before a token."""
    starts_G = torch.tensor(groups.starts(), device=device, dtype=torch.int64)
    return torch.arange(groups.num_tokens, device=device) - starts_G[groups.index(device)]


def drops_by_position(plan: RoutingPlan, bins: int) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " N"]] | None:
    """Assignments asked for, and those dropped, by the place of their token in its routing group.

    Slots that are given in the order of the tokens run out towards the end of a group, so that how likely a token is
    dropped depends on where it stands. A token asks for k experts, or for as many as ``plan.aux["asked"]`` says.

    Args:
        plan: of one forward pass.
        bins: N; bin n holds the positions from n/N to (n + 1)/N of the group's length.

    Returns:
        Both [N]; None if some tokens asked for fewer than k experts and the plan does not say which.
    """
    device = plan.token_index.device
    size_T = _sizes(plan.groups, device)[plan.groups.index(device)]
    bin_T = position_in_group(plan.groups, device) * bins // size_T
    kept_N = torch.bincount(bin_T[plan.token_index], minlength=bins)
    if len(plan.token_index) == int(plan.asked):
        return kept_N, torch.zeros_like(kept_N)
    asked_T = plan.aux.get("asked")
    if asked_T is None and int(plan.asked) < plan.num_tokens * plan.top_k:
        return None
    asked_T = torch.full_like(bin_T, plan.top_k) if asked_T is None else asked_T
    asked_N = torch.zeros_like(kept_N).index_add(0, bin_T, asked_T)
    return asked_N, asked_N - kept_N


def _sizes(groups: RoutingGroups, device: torch.device | str) -> Int64[Tensor, " G"]:
    return torch.tensor(groups.sizes, device=device, dtype=torch.int64)


def _table(plan: RoutingPlan) -> tuple[Bool[Tensor, "T E"], Float[Tensor, "T E"]]:
    """Which experts a token has, and with which gates."""
    shape = (plan.num_tokens, plan.num_experts)
    kept_TE = torch.zeros(shape, dtype=torch.bool, device=plan.token_index.device)
    weight_TE = torch.zeros(shape, device=plan.token_index.device)
    kept_TE[plan.token_index, plan.expert_index] = True
    weight_TE[plan.token_index, plan.expert_index] = plan.weight.detach().float()
    return kept_TE, weight_TE
