"""In which precision a router computes: float32 at least, and float64 where the tokens are."""

import torch

from lightning_base.check_router.check import Broken, check
from lightning_base.check_router.subject import Subject, decisions, first_difference, groups_of, route, told

# Relative to tokens of size 3: lost in float32, and not in float64.
SMALL, LARGE = 1e-10, 1e-3


@check
def float64(subject: Subject) -> None:
    """Given float64 it computes in float64: layouts of ranks are compared to the last digit there."""
    size = 40 * subject.scale
    for way, router in subject.ways():
        router.double()
        tokens, ids = subject.tokens(size)
        tokens = tokens.double()
        plan = route(router, tokens, ids, groups_of(size))
        for name, value in {"weight": plan.weight, **plan.losses}.items():
            if value.dtype != torch.float64:
                raise Broken(
                    f"in {way}, given tokens in float64, its {name} is {value.dtype}: compute in "
                    "full_precision(tokens) of lightning_base.routing.selection instead of tokens.float()"
                )
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        moved = [route(router, tokens + part * noise, ids, groups_of(size)).weight for part in (LARGE, SMALL)]
        depends, notices = (len(weight) != len(plan.weight) or not torch.equal(weight, plan.weight) for weight in moved)
        if depends and not notices:
            raise Broken(
                f"in {way}, in float64, its gates change when tokens move by {LARGE} and not when they move by "
                f"{SMALL}: something on the way is rounded to float32; full_precision(tokens) keeps float64"
            )


@check
def mixed_precision(subject: Subject) -> None:
    """Under autocast to bfloat16 it decides as without, and gives its gates in float32."""
    size = 40 * subject.scale
    for way, router in subject.ways():
        tokens, ids = subject.tokens(size)
        plain = decisions(route(router, tokens, ids, groups_of(size)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plan = route(router, tokens, ids, groups_of(size))
        mixed = decisions(plan)
        token = first_difference(plain, mixed)
        advice = "compute scores inside torch.autocast(tokens.device.type, enabled=False), with full_precision(tokens)"
        if token is not None:
            raise Broken(
                f"in {way}, under autocast to bfloat16, token {token} had {told(mixed[token])} instead of "
                f"{told(plain[token])}: {advice}"
            )
        if plan.weight.dtype != torch.float32:
            raise Broken(f"in {way}, under autocast to bfloat16, its weight is {plan.weight.dtype}: {advice}")
