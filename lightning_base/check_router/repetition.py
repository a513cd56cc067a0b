"""A plan is a function of the router's parameters and buffers, and of what is to be routed."""

import copy

import torch

from lightning_base.check_router.check import Broken, check
from lightning_base.check_router.subject import (
    Subject,
    brief,
    decisions,
    first_difference,
    groups_of,
    losses_of,
    set_way,
    told,
)
from lightning_base.routing.plan import RoutingPlan


@check
def repetition(subject: Subject) -> None:
    """Routing twice gives the same plan, whatever else has drawn random numbers or was routed meanwhile."""
    groups = groups_of(100 * subject.scale, 100 * subject.scale)
    for way, router in subject.ways():
        tokens, ids = subject.tokens(groups.num_tokens)
        before, given = copy.deepcopy(router.state_dict()), (tokens.clone(), ids.clone())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            first = router(tokens, ids, groups)
            router(*subject.tokens(groups.num_tokens, seed=5), groups)
            torch.manual_seed(2)
            second = router(tokens, ids, groups)
            again = set_way(subject.use(), way)(*given, groups)
        if not (torch.equal(tokens, given[0]) and torch.equal(ids, given[1])):
            raise Broken(f"in {way} forward changed the tokens it was given: work on a copy")
        for name, value in router.state_dict().items():
            if not torch.equal(value, before[name]):
                raise Broken(
                    f"in {way} forward changed {name} from {brief(before[name])} to {brief(value)}: change what is "
                    "remembered in end_step, which comes once a step however the step is cut"
                )
        same(first, second, f"in {way} the plan changed between two identical calls")
        same(first, again, f"in {way} the plan of a router built anew from the same seed is another one")


def same(one: RoutingPlan, other: RoutingPlan, sentence: str) -> None:
    """Raises ``Broken`` unless the two plans are the same to the last digit."""
    fields = ("token_index", "expert_index", "weight")
    losses, others = losses_of(one), losses_of(other)
    changed = [name for name, loss in losses.items() if not torch.equal(loss, others[name])]
    if not changed and all(torch.equal(getattr(one, name), getattr(other, name)) for name in fields):
        return
    first, second = decisions(one), decisions(other)
    token = first_difference(first, second)
    if token is not None:
        what = f"token {token} had {told(first[token])}, then {told(second[token])}"
    elif changed:
        what = f"its {changed[0]} was {brief(losses[changed[0]])}, then {brief(others[changed[0]])}"
    else:
        what = "the weights differ in late digits, or the order of the assignments does"
    raise Broken(
        f"{sentence}: {what}; draw noise from lightning_base.routing.noise instead of torch.rand, and keep what is "
        "remembered in buffers"
    )
