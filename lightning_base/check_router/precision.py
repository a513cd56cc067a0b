"""In which precision a router computes: float32 at least, and float64 where the tokens are."""

import torch
from torch import Tensor

from lightning_base.check_router.check import Broken, check
from lightning_base.check_router.subject import (
    Subject,
    decisions,
    first_difference,
    groups_of,
    losses_of,
    other_loss,
    route,
    told,
)
from lightning_base.routing.plan import RoutingPlan

# Relative to tokens of size 3: lost in float32, and not in float64; and not lost in either.
SMALL, LARGE = 1e-10, (1e-3, 1e-4, 1e-5)


@check
def float64(subject: Subject) -> None:
    """Given float64 it computes in float64: layouts of ranks are compared to the last digit there."""
    size = 40 * subject.scale
    for way, router in subject.ways():
        router.double()
        tokens, ids = subject.tokens(size)
        tokens = tokens.double()
        plan = route(router, tokens, ids, groups_of(size))
        for name, value in numbers(plan).items():
            if value.dtype != torch.float64:
                raise Broken(
                    f"in {way}, given tokens in float64, its {name} is {value.dtype}: compute in "
                    "full_precision(tokens) of lightning_base.routing.selection instead of tokens.float()"
                )
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        small, *larger = (route(router, tokens + part * noise, ids, groups_of(size)) for part in (SMALL, *LARGE))
        # Where a token stood at the edge between two experts and went over, all may change at once.
        large = next((moved for moved in larger if same_experts(plan, moved)), None)
        if large is None or not same_experts(plan, small):
            continue
        for name, value in numbers(plan).items():
            depends, notices = (not torch.equal(numbers(moved)[name], value) for moved in (large, small))
            if depends and not notices:
                raise Broken(
                    f"in {way}, in float64, its {name} changes when tokens move by {LARGE[0]} and not when they move "
                    f"by {SMALL}: something on the way is rounded to float32; full_precision(tokens) keeps float64"
                )


def numbers(plan: RoutingPlan) -> dict[str, Tensor]:
    """What a plan computes with."""
    return {"weight": plan.weight, **losses_of(plan)}


def same_experts(one: RoutingPlan, other: RoutingPlan) -> bool:
    return torch.equal(one.token_index, other.token_index) and torch.equal(one.expert_index, other.expert_index)


@check
def mixed_precision(subject: Subject) -> None:
    """Under autocast to bfloat16 it decides as without, with tokens in float32 or bfloat16, and computes in float32."""
    size = 40 * subject.scale
    for way, router in subject.ways():
        tokens, ids = subject.tokens(size)
        tokens = tokens.bfloat16().float()
        plain = route(router, tokens, ids, groups_of(size))
        for given in (tokens, tokens.bfloat16()):
            where = f"in {way}, under autocast to bfloat16, given tokens in {given.dtype},"
            try:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    plan = route(router, given, ids, groups_of(size))
            except Exception as error:
                error.add_note(where.strip(","))
                raise
            in_float32(plan, plain, where)


def in_float32(plan: RoutingPlan, plain: RoutingPlan, where: str) -> None:
    """Raises ``Broken`` unless a plan under autocast is the plan without."""
    advice = "compute scores inside torch.autocast(tokens.device.type, enabled=False), with full_precision(tokens)"
    one, other = decisions(plain), decisions(plan)
    token, loss = first_difference(one, other), other_loss(plain, plan)
    if token is not None:
        raise Broken(f"{where} token {token} had {told(other[token])} instead of {told(one[token])}: {advice}")
    if loss:
        raise Broken(f"{where} {loss}: {advice}")
    for name, value in numbers(plan).items():
        # A gate of 1 is the same in either.
        if value.dtype != torch.float32 and "tokens in torch.float32" in where:
            raise Broken(f"{where} its {name} is {value.dtype}: {advice}")
