"""What is asked for, what is served and what is dropped, counted by hand; and what a step hands on of it.

Shapes: A assignments, G routing groups, E experts, T tokens.
"""

import copy

import torch
from torch import Tensor

from lightning_base.check_router.check import Broken, NotAsked, check
from lightning_base.check_router.plan import SIZES, WITH_EMPTY_GROUPS, plans_of
from lightning_base.check_router.subject import Subject, brief, groups_of, route
from lightning_base.routing.plan import RoutingPlan
from lightning_base.routing.router import Router

# Tokens of each group: so many for each expert, and so many more. The last divide evenly together, not group by group.
SHARES = (((8, 0),), ((4, 0), (4, 0)), ((2, 0), (8, 0)), ((5, 1),), ((2, 1), (4, 0)), ((4, 1), (2, -1)))


@check
def load(subject: Subject) -> None:
    """What experts are asked for and serve adds up to tokens times k less what is dropped."""
    for plan, router, given in plans_of(subject, SIZES + WITH_EMPTY_GROUPS):
        add_up(plan, router, given)


def add_up(plan: RoutingPlan, router: Router, given: str) -> None:
    sizes, k = plan.groups.sizes, router.top_k
    for group, (n, limit) in enumerate(zip(plan.group_demand.sum(1).tolist(), [k * s for s in sizes], strict=True)):
        if n > limit or (n < limit and not router.asks_for_fewer):
            or_declare = "" if n > limit else ", or the router declares asks_for_fewer = True"
            raise Broken(
                f"{given} the {sizes[group]} tokens of group {group} asked for {n} experts in all, with top_k={k}: it "
                f"should be {limit}{or_declare}"
            )
    group_of_token = [g for g, size in enumerate(sizes) for _ in range(size)]
    served = [[0] * router.num_experts for _ in sizes]
    for token, expert in zip(plan.token_index.tolist(), plan.expert_index.tolist(), strict=True):
        served[group_of_token[token]][expert] += 1
    for group, demand in enumerate(plan.group_demand.tolist()):
        slots = None if plan.capacity is None else int(plan.capacity[group])
        for expert, (asked, got) in enumerate(zip(demand, served[group], strict=True)):
            should = asked if slots is None else min(asked, slots)
            if got != should:
                how = "no capacity, so that nothing is dropped," if slots is None else f"{slots} slots"
                raise Broken(
                    f"{given} {asked} tokens of group {group} asked for expert {expert} and {got} were served; with "
                    f"{how} it should be {should}: count_by_group counts group_demand, before drops"
                )


@check
def equal_loads(subject: Subject) -> None:
    """Where a plan says equal_loads, every expert serves equally many tokens, and would of any others."""
    declared = False
    for way, router in subject.ways():
        for shares in SHARES:
            groups = groups_of(*(share * router.num_experts + more for share, more in shares))
            tokens, ids = subject.tokens(groups.num_tokens)
            alike = tokens[:1].expand_as(tokens).contiguous(), ids[:1].expand_as(ids).contiguous()
            plans = {
                "random tokens": route(router, tokens, ids, groups),
                "others": route(router, *subject.tokens(groups.num_tokens, 1), groups),
                "tokens that are all alike": route(router, *alike, groups),
            }
            if not any(plan.equal_loads for plan in plans.values()):
                continue
            declared = True
            for given, plan in plans.items():
                if not plan.equal_loads or len(plan.load.unique()) > 1:
                    raise Broken(
                        f"in {way}, given groups of {list(groups.sizes)} tokens, a plan says equal_loads=True, and of "
                        f"{given} experts serve {plan.load.tolist()} (equal_loads={plan.equal_loads}): declare it "
                        "where loads are equal by construction, as groups.even_over tells, or ranks would hang"
                    )
    if not declared:
        raise NotAsked("no plan says equal_loads")


@check
def step_sums(subject: Subject) -> None:
    """What step_sums gives of a batch is the sum of what it gives of the batch's parts."""
    sizes = tuple(size * subject.scale for size in (20, 24, 20))
    router = subject.build()
    for seed in range(2):  # at first, and once something is remembered
        tokens, ids = subject.tokens(sum(sizes), seed)
        before = copy.deepcopy(router.state_dict())
        whole = summed(router, route(router, tokens, ids, groups_of(*sizes)))
        parts = [
            summed(router, route(router, part, part_ids, groups_of(len(part))))
            # The last is of a rank whose share of the step is all padding.
            for part, part_ids in zip(tokens.split((*sizes, 0)), ids.split((*sizes, 0)), strict=True)
        ]
        if not whole and not any(parts):
            raise NotAsked("it hands nothing on from step_sums")
        for name, value in whole.items():
            if any(name not in part for part in parts):
                raise Broken(f"step_sums gave {name} of some passes and not of others: give it always")
            shapes = {tuple(part[name].shape) for part in parts} | {tuple(value.shape)}
            if len(shapes) > 1:
                raise Broken(f"step_sums gave {name} in the shapes {sorted(shapes)}: the same for every pass is wanted")
            total = torch.stack([part[name].double() for part in parts]).sum(0)
            if not torch.allclose(total, value.double(), rtol=1e-5, atol=1e-8):
                raise Broken(
                    f"step_sums gave {name}=[{brief(value)}] of three groups at once, and [{brief(total)}] as the sum "
                    "over three passes of one group each and one without tokens: give sums, and divide in end_step"
                )
        if any(not torch.equal(value, before[name]) for name, value in router.state_dict().items()):
            raise Broken("step_sums changed a buffer: change what is remembered in end_step")
        router.end_step(whole)


def summed(router: Router, plan: RoutingPlan) -> dict[str, Tensor]:
    found = router.step_sums(plan.detached())
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.requires_grad:
            raise Broken(f"step_sums gave {name} as {type(value).__name__} with a gradient or no tensor at all")
    return found
