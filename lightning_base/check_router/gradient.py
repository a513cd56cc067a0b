"""What a router learns from: its gates, and its auxiliary losses.

Shapes: T tokens, D width, A assignments.
"""

import copy

import torch
from torch import Tensor

from lightning_base.check_router.check import Broken, NotAsked, check
from lightning_base.check_router.padding import layer_of
from lightning_base.check_router.subject import Subject, groups_of, route, seeded
from lightning_base.routing.losses import finish_step_loss
from lightning_base.routing.plan import RoutingPlan
from lightning_base.routing.router import Router

STEP, TOLERANCE = 1e-6, 1e-4
DIRECTIONS = 3


def learning(router: Router) -> dict[str, torch.nn.Parameter]:
    """The parameters that are to learn; NotAsked if there are none."""
    found = {name: parameter for name, parameter in router.named_parameters() if parameter.requires_grad}
    if not found:
        raise NotAsked("it has no parameters to learn")
    return found


@check
def gate_gradient(subject: Subject) -> None:
    """Every parameter learns from the layer's output, and the gradient is what a finite difference says, or is declared
    another."""
    router = subject.draw()
    learning(router)
    layer = layer_of(router)
    tokens, ids = subject.tokens(40 * subject.scale)
    output, _ = layer(tokens.view(4, 10 * subject.scale, -1), ids.view(4, -1))
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    total = (output * direction).sum()
    if total.requires_grad:
        total.backward()
    for name, parameter in learning(layer.router).items():
        if parameter.grad is None or not bool(parameter.grad.any()):
            if parameter.grad is not None and router.num_experts == 1:
                raise NotAsked("with one expert there is nothing to choose, and its gates are constant")
            raise Broken(
                f"its parameter {name} got {'no gradient' if parameter.grad is None else 'a gradient of 0'} from the "
                "layer's output: let it enter the plan's weight without detach(), or set requires_grad = False"
            )
        if not bool(torch.isfinite(parameter.grad).all()):
            raise Broken(
                f"its parameter {name} got a gradient that is not finite from the layer's output: keep roots and "
                "quotients away from 0, where their values may be finite and their slopes are not"
            )
    compared = [found for seed in range(DIRECTIONS) if (found := as_a_difference(subject, seed)) is not None]
    apart = [sentence for agree, sentence in compared if not agree]
    if apart and not router.straight_through:
        raise Broken(
            f"{apart[0]}: let the gradient flow through all that the plan's weight is computed from, or declare "
            "straight_through = True"
        )
    if router.straight_through and compared and not apart:
        raise Broken(
            f"it declares straight_through = True, and {compared[0][1]}: declare straight_through = False, or the "
            "report would say that its gradient is another"
        )


def as_a_difference(subject: Subject, seed: int) -> tuple[bool, str] | None:
    """Whether the gradient along a random direction is a central difference, in float64, with decisions as they are.

    Both in words too; None if a token stood at the edge between two experts, and went over.
    """
    router = subject.build().double()
    size = 24 * subject.scale
    tokens, ids = subject.tokens(size, seed)
    tokens = tokens.double()
    generator = torch.Generator().manual_seed(seed)
    towards = {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for name, parameter in learning(router).items()
    }
    plan = route(router, tokens, ids, groups_of(size))
    factor_A = torch.randn(len(plan.weight), generator=generator, dtype=torch.float64)

    def value(shift: float) -> tuple[RoutingPlan, Tensor, Router]:
        moved = copy.deepcopy(router)
        with torch.no_grad():
            for name, parameter in learning(moved).items():
                parameter.add_(shift * towards[name])
        with seeded():
            found = moved(tokens, ids, groups_of(size))
        same = torch.equal(found.token_index, plan.token_index) and torch.equal(found.expert_index, plan.expert_index)
        return found, (found.weight.double() * factor_A).sum() if same else torch.tensor(torch.nan), moved

    _, centre, moved = value(0.0)
    if not centre.requires_grad:
        raise Broken("in float64 the plan's weight has no gradient: do not detach() it")
    gradients = torch.autograd.grad(centre, list(learning(moved).values()), allow_unused=True)
    along = sum(
        float((gradient * towards[name]).sum())
        for (name, _), gradient in zip(learning(moved).items(), gradients, strict=True)
        if gradient is not None
    )
    with torch.no_grad():
        difference = (value(STEP)[1] - value(-STEP)[1]).item() / (2 * STEP)
    if difference != difference:
        return None
    return abs(along - difference) <= TOLERANCE * max(1.0, abs(difference)), (
        f"along a random direction its gates change by {difference:.6g} (a finite difference, in float64), and the "
        f"gradient says {along:.6g}"
    )


@check
def auxiliary_losses(subject: Subject) -> None:
    """Every auxiliary loss reaches the router's parameters."""
    router = subject.build()
    if not router.loss_coefficients:
        raise NotAsked("it has no auxiliary losses")
    size = 40 * subject.scale
    tokens, ids = subject.tokens(size)
    # A loss may leave balanced loads alone: those of tokens that are all alike are not.
    alike = tokens[:1].expand_as(tokens).contiguous(), ids[:1].expand_as(ids).contiguous()
    plans = [router(*given, groups_of(size)) for given in ((tokens, ids), alike)]
    reached: dict[str, list[bool]] = {}
    for plan in plans:
        finished = {name: finish_step_loss(part, part.demand, size) for name, part in plan.step_losses.items()}
        for name, value in {**plan.losses, **finished}.items():
            reached.setdefault(name, []).append(reaches(router, name, value))
    unreached = [name for name, found in reached.items() if not any(found)]
    if unreached and router.num_experts == 1:
        raise NotAsked("with one expert there is nothing to balance")
    for name in unreached:
        raise Broken(
            f"its {name} gives no parameter a gradient: compute it from probabilities that are not detached, since "
            "counts have none"
        )


def reaches(router: Router, name: str, value: Tensor) -> bool:
    """Whether a loss gives any parameter a gradient."""
    if not value.requires_grad:
        return False
    gradients = torch.autograd.grad(value, list(router.parameters()), retain_graph=True, allow_unused=True)
    found = [gradient for gradient in gradients if gradient is not None]
    if not all(bool(torch.isfinite(gradient).all()) for gradient in found):
        raise Broken(
            f"the gradient of its {name} is not finite: keep roots and quotients away from 0, where their values may "
            "be finite and their slopes are not"
        )
    return any(bool(gradient.any()) for gradient in found)
