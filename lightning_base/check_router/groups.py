"""Routing groups: what is routed together, and nothing besides."""

import math

from lightning_base.check_router.check import Broken, check
from lightning_base.check_router.subject import Subject, decisions, first_difference, groups_of, route, told


@check
def groups(subject: Subject) -> None:
    """A routing group does not see another group: neither its tokens nor how many groups there are."""
    sizes = tuple(size * subject.scale for size in (20, 24, 20))
    total, (start, end) = sum(sizes), (sizes[0], sizes[0] + sizes[1])
    for way, router in subject.ways():
        tokens, ids = subject.tokens(total)
        other_tokens, other_ids = subject.tokens(total, seed=1)
        mixed_tokens, mixed_ids = tokens.clone(), ids.clone()
        mixed_tokens[start:end], mixed_ids[start:end] = other_tokens[start:end], other_ids[start:end]
        together = route(router, tokens, ids, groups_of(*sizes))
        before = decisions(together)
        after = decisions(route(router, mixed_tokens, mixed_ids, groups_of(*sizes)))
        rest, other_rest = ([*found[:start], *found[end:]] for found in (before, after))
        token = first_difference(rest, other_rest)
        if token is not None:
            raise Broken(
                f"in {way}, when the second of three routing groups got another text, a token of another group went "
                f"from {told(rest[token])} to {told(other_rest[token])}: "
                "route each group by itself, as groups.split and groups.sum do"
            )
        parts = zip(tokens.split(sizes), ids.split(sizes), strict=True)
        alone = [route(router, part, part_ids, groups_of(len(part))) for part, part_ids in parts]
        apart = [decision for plan in alone for decision in decisions(plan)]
        token = first_difference(before, apart)
        if token is not None:
            raise Broken(
                f"in {way}, token {token} had {told(before[token])} when three groups were routed at once, and "
                f"{told(apart[token])} when its group was routed alone: nothing may depend on how many groups there are"
            )
        for loss, value in together.losses.items():
            mean = sum(plan.losses[loss].item() for plan in alone) / len(alone)
            if not math.isclose(value.item(), mean, rel_tol=1e-5, abs_tol=1e-7):
                raise Broken(
                    f"in {way} the loss {loss} of three groups is {value.item():.6g}, and the mean of their own is "
                    f"{mean:.6g}: average a loss over the groups that hold tokens, or return it in step_losses"
                )
