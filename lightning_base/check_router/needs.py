"""What a router is given beside the vectors of tokens: not every model has it."""

from lightning_base.check_router.check import Broken, check
from lightning_base.check_router.subject import Subject, decisions, first_difference, other_loss, route, told
from lightning_base.routing.plan import RoutingGroups, RoutingPlan


@check
def needs(subject: Subject) -> None:
    """It looks at token ids, and at single sequences, only where it says that it needs them."""
    size = 32 * subject.scale
    groups, others = (RoutingGroups((size, size), (cut, size - cut, cut, size - cut)) for cut in (8, 20))
    for way, router in subject.ways():
        tokens, ids = subject.tokens(groups.num_tokens)
        plan = route(router, tokens, ids, groups)
        if not router.needs_token_ids:
            other_ids = subject.tokens(groups.num_tokens, seed=1)[1]
            found = difference(plan, route(router, tokens, other_ids, groups))
            if found:
                raise Broken(
                    f"in {way} it declares needs_token_ids = False, and when only token ids changed, {found}: declare "
                    "needs_token_ids = True, or a model that cannot give ids would be routed by zeros"
                )
        if not router.needs_sequences:
            found = difference(plan, route(router, tokens, ids, others))
            if found:
                raise Broken(
                    f"in {way} it declares needs_sequences = False, and when only the borders of sequences within a "
                    f"group changed, {found}: declare needs_sequences = True, or a shuffle would cut sequences up"
                )


def difference(one: RoutingPlan, other: RoutingPlan) -> str | None:
    """What became of the first token that is treated differently, or else of a loss; None if nothing changed."""
    before, after = decisions(one), decisions(other)
    token = first_difference(before, after)
    if token is None:
        return other_loss(one, other)
    return f"token {token} went from {told(before[token])} to {told(after[token])}"
