"""Tokens at the edge of what there can be: one, fewer than experts, all alike, and no numbers at all."""

import torch
from torch import Tensor

from lightning_base.check_router.check import Broken, check
from lightning_base.check_router.construction import refused_in_one_sentence
from lightning_base.check_router.load import add_up
from lightning_base.check_router.plan import well_formed
from lightning_base.check_router.subject import Subject, groups_of, route, seeded
from lightning_base.routing.plan import RoutingPlan
from lightning_base.routing.router import Router


@check
def few_or_equal_tokens(subject: Subject) -> None:
    """One token, fewer tokens than experts, and tokens that are all alike are routed, or refused in a sentence."""
    experts = subject.router.num_experts
    for way, router in subject.ways():
        tokens, ids = subject.tokens(8 * experts)
        alike = tokens[:1].expand_as(tokens).contiguous(), ids[:1].expand_as(ids).contiguous()
        few = max(1, experts - 1)
        zeros = torch.zeros_like(tokens)
        for given, case in {
            "one token": (tokens[:1], ids[:1]),
            f"{few} tokens for {experts} experts": (tokens[:few], ids[:few]),
            f"{8 * experts} tokens that are all alike": alike,
            f"{8 * experts} tokens that are all zero": (zeros, ids),
        }.items():
            what = f"in {way}, given {given},"
            plan = tried(router, *case, what)
            if plan is None:
                continue
            well_formed(plan, router, what)
            add_up(plan, router, what)
            if plan.weight.requires_grad:
                finite_gradients(router, *case, what)


@check
def not_a_number(subject: Subject) -> None:
    """Tokens that are NaN or infinite are refused in a sentence, or go to experts that there are."""
    size = 4 * subject.router.num_experts
    for way, router in subject.ways():
        for value in (torch.nan, torch.inf):
            for where in (slice(1, 2), slice(None)):
                tokens, ids = subject.tokens(size)
                tokens[where] = value
                given = f"in {way}, given {'one token' if where.stop else 'tokens'} of {value},"
                plan = tried(router, tokens, ids, given)
                if plan is None:
                    continue
                for name, index, end in (
                    ("token", plan.token_index, size),
                    ("expert", plan.expert_index, router.num_experts),
                ):
                    outside = [i for i in index.tolist() if not 0 <= i < end]
                    if outside:
                        raise Broken(
                            f"{given} {name}_index holds {outside[0]}, with {end} {name}s: raise ValueError with one "
                            "sentence, or choose among those there are"
                        )


def finite_gradients(router: Router, tokens: Tensor, ids: Tensor, given: str) -> None:
    """Raises ``Broken`` for a gradient of the gates that would end a run."""
    tokens, learning = tokens.clone().requires_grad_(), [p for p in router.parameters() if p.requires_grad]
    with seeded():
        total = router(tokens, ids, groups_of(len(tokens))).weight.sum()
    for gradient in torch.autograd.grad(total, [tokens, *learning], allow_unused=True):
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            raise Broken(
                f"{given} the gradient of its gates is not finite: keep roots and quotients away from 0, where their "
                "values may be finite and their slopes are not"
            )


def tried(router: Router, tokens: Tensor, ids: Tensor, given: str) -> RoutingPlan | None:
    """The plan; None if the router refuses these tokens in one sentence."""
    try:
        return route(router, tokens, ids, groups_of(len(tokens)))
    except ValueError as error:
        refused_in_one_sentence(error, given)
        return None
    except Exception as error:
        error.add_note(given.strip(","))
        raise
