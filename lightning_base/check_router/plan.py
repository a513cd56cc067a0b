"""What a router returns: a RoutingPlan that is well formed.

Shapes: A assignments, G routing groups, E experts, T tokens.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_base.check_router.check import Broken, check
from lightning_base.check_router.subject import Subject, decisions, first_difference, groups_of, other_loss, route
from lightning_base.routing.plan import RoutingPlan
from lightning_base.routing.router import Router

SIZES = ((64,), (32, 32), (5, 40, 1, 18))
WITH_EMPTY_GROUPS = ((), (0,), (0, 0), (0, 24, 0, 8))


@check
def plan(subject: Subject) -> None:
    """The plan has the shapes, types and ranges of a RoutingPlan."""
    for found, router, given in plans_of(subject, SIZES):
        well_formed(found, router, given)


@check
def empty_groups(subject: Subject) -> None:
    """A batch without tokens, or with groups that have none, is routed too, and these groups change nothing."""
    for found, router, given in plans_of(subject, WITH_EMPTY_GROUPS):
        well_formed(found, router, given)
        sizes = tuple(size for size in found.groups.sizes if size)
        if not sizes:
            continue
        held = route(router, *subject.tokens(sum(sizes)), groups_of(*sizes))
        loss, token = other_loss(held, found), first_difference(decisions(held), decisions(found))
        if loss or token is not None:
            what = f"token {token} was treated differently" if token is not None else loss
            raise Broken(f"{given} {what} for the groups that have none: average over the groups that hold tokens")


def plans_of(subject: Subject, every_sizes: tuple[tuple[int, ...], ...]) -> Iterator[tuple[RoutingPlan, Router, str]]:
    """The plan of groups of each of these sizes in each way of routing, with the router and what it was given."""
    for way, router in subject.ways():
        for sizes in every_sizes:
            groups = groups_of(*(size * subject.scale for size in sizes))
            given = f"in {way}, given groups of {list(groups.sizes)} tokens,"
            try:
                found = route(router, *subject.tokens(groups.num_tokens), groups)
            except Exception as error:
                error.add_note(given.strip(","))
                raise
            if not isinstance(found, RoutingPlan):
                raise Broken(f"{given} forward returned a {type(found).__name__}: return a RoutingPlan")
            if found.groups is not groups and found.groups != groups:
                raise Broken(f"{given} the plan's groups hold {list(found.groups.sizes)} tokens: hand the groups on")
            yield found, router, given


def well_formed(plan: RoutingPlan, router: Router, given: str) -> None:
    """Raises ``Broken`` for the first thing that is wrong with a plan."""
    count, experts = len(plan.token_index), router.num_experts
    shapes(plan, router, given)
    for name, index, end in (("token", plan.token_index, plan.num_tokens), ("expert", plan.expert_index, experts)):
        outside = [i for i in index.tolist() if not 0 <= i < end]
        if outside:
            raise Broken(f"{given} {name}_index holds {outside[0]}: {name}s are numbered from 0 to {end - 1}")
    pairs = list(zip(plan.token_index.tolist(), plan.expert_index.tolist(), strict=True))
    if len(set(pairs)) < count:
        token, expert = next(pair for i, pair in enumerate(pairs) if pair in pairs[:i])
        raise Broken(f"{given} token {token} went to expert {expert} twice: an expert takes a token once")
    finite(plan, router, given)


def shapes(plan: RoutingPlan, router: Router, given: str) -> None:
    count, experts, groups = len(plan.token_index), router.num_experts, plan.groups
    wanted: dict[str, tuple[Tensor, list[int], bool]] = {
        "token_index": (plan.token_index, [count], True),
        "expert_index": (plan.expert_index, [count], True),
        "weight": (plan.weight, [count], False),
        "group_demand": (plan.group_demand, [len(groups.sizes), experts], True),
    }
    if plan.capacity is not None:
        wanted["capacity"] = (plan.capacity, [len(groups.sizes)], True)
    for name, part in plan.step_losses.items():
        wanted[f"the demand of {name}"] = (part.demand, [experts], True)
        wanted[f"the probability_sum of {name}"] = (part.probability_sum, [experts], False)
        if part.num_tokens != plan.num_tokens:
            raise Broken(f"{given} num_tokens of {name} is {part.num_tokens}: it should be {plan.num_tokens}")
    if "probabilities" in plan.aux:
        wanted["aux['probabilities']"] = (plan.aux["probabilities"], [plan.num_tokens, experts], False)
    if "asked" in plan.aux:
        wanted["aux['asked']"] = (plan.aux["asked"], [plan.num_tokens], True)
    for name, (tensor, shape, whole) in wanted.items():
        if list(tensor.shape) != shape:
            raise Broken(f"{given} {name} has the shape {list(tensor.shape)}: it should be {shape}")
        if (tensor.dtype == torch.int64) != whole or tensor.is_floating_point() == whole:
            kind = "torch.int64" if whole else "a floating-point type"
            raise Broken(f"{given} {name} is {tensor.dtype}: it should be {kind}")
    if plan.top_k != router.top_k:
        raise Broken(f"{given} the plan says top_k={plan.top_k} and the router {router.top_k}: they should agree")


def finite(plan: RoutingPlan, router: Router, given: str) -> None:
    odd = [weight for weight in plan.weight.tolist() if not math.isfinite(weight)]
    if odd:
        raise Broken(f"{given} a weight is {odd[0]}, which is not finite")
    for name, loss in plan.losses.items():
        if loss.ndim or not bool(torch.isfinite(loss)):
            raise Broken(f"{given} its loss {name} is {loss.tolist()}: one finite number is wanted")
    declared, returned = set(router.loss_coefficients), {*plan.losses, *plan.step_losses}
    if declared != returned:
        raise Broken(
            f"{given} it returned the losses {sorted(returned)} and declares loss_coefficients for {sorted(declared)}: "
            "they should agree, also for groups without tokens"
        )
    for name, value in plan.aux.items():
        if value.requires_grad:
            raise Broken(f"{given} aux[{name!r}] has a gradient: detach() it, or whoever keeps it keeps the graph")
    gates(plan, given)


def gates(plan: RoutingPlan, given: str) -> None:
    """What alarms and entropies are computed from."""
    probabilities_TE, asked_T = plan.aux.get("probabilities"), plan.aux.get("asked")
    if probabilities_TE is not None:
        sums = [
            total for total in probabilities_TE.double().sum(1).tolist() if not math.isclose(total, 1, abs_tol=1e-3)
        ]
        if sums or bool((probabilities_TE < 0).any()):
            what = f"a row of aux['probabilities'] sums to {sums[0]:.4g}" if sums else "aux['probabilities'] is below 0"
            raise Broken(f"{given} {what}: it is a distribution over experts for each token; leave out what is none")
    if "gates" in plan.aux and bool(((plan.aux["gates"] < 0) | (plan.aux["gates"] > 1)).any()):
        raise Broken(f"{given} aux['gates'] goes beyond 0 to 1: it holds sigmoids of the experts chosen")
    if asked_T is not None and int(asked_T.sum()) != int(plan.asked):
        raise Broken(
            f"{given} aux['asked'] sums to {int(asked_T.sum())}, and group_demand to {int(plan.asked)}: both count "
            "what was asked for, before any drop"
        )
