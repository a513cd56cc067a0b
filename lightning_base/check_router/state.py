"""What a router remembers from step to step."""

import io

import torch

from lightning_base.check_router.check import Broken, check
from lightning_base.check_router.subject import (
    TRAINING,
    Subject,
    decisions,
    first_difference,
    groups_of,
    other_loss,
    seeded,
    set_way,
    told,
)
from lightning_base.routing.plan import RoutingPlan
from lightning_base.routing.router import Router

STEPS = 3


@check
def state(subject: Subject) -> None:
    """All that is remembered is in buffers: saved and loaded into a new router, it goes on as before."""
    router = subject.build()
    for seed in range(STEPS):
        step(subject, router, seed)
    file = io.BytesIO()
    torch.save(router.state_dict(), file)
    file.seek(0)
    resumed = subject.build(seed=9)
    try:
        resumed.load_state_dict(torch.load(file, weights_only=True))
    except Exception as error:
        raise Broken(
            f"its state_dict after {STEPS} steps could not be loaded into a new one: {' '.join(str(error).split())}; "
            "register every buffer in __init__, with the shape it keeps"
        ) from error
    for later in range(2):
        for way in (*router.evaluation_modes, TRAINING):
            plans = [step(subject, set_way(each, way), STEPS + later) for each in (router, resumed)]
            one, other = map(decisions, plans)
            token, loss = first_difference(one, other), other_loss(*plans)
            if token is not None or loss:
                what = (
                    loss if token is None else f"token {token} had {told(other[token])} instead of {told(one[token])}"
                )
                raise Broken(
                    f"in {way}, in step {later + 1} after it was saved and loaded, {what}: keep what is remembered in "
                    "buffers"
                )


def step(subject: Subject, router: Router, seed: int) -> RoutingPlan:
    """Routes, and in training ends a step."""
    groups = groups_of(32 * subject.scale, 32 * subject.scale)
    with seeded():
        plan: RoutingPlan = router(*subject.tokens(groups.num_tokens, seed), groups)
    if router.training:
        router.end_step(router.step_sums(plan.detached()))
    return plan
