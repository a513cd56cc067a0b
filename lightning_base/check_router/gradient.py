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
    """Every parameter learns from the layer's output, and the gradient is what a finite difference says."""
    router = subject.build()
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
            raise Broken(
                f"its parameter {name} got {'no gradient' if parameter.grad is None else 'a gradient of 0'} from the "
                "layer's output: let it enter the plan's weight without detach(), or set requires_grad = False"
            )
    for seed in range(DIRECTIONS):
        as_a_difference(subject, seed)


def as_a_difference(subject: Subject, seed: int) -> None:
    """Compares the gradient along a random direction with a central difference, in float64, with decisions as they
    are."""
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
    # NaN: a token stood at the edge between two experts, and went over.
    if difference == difference and abs(along - difference) > TOLERANCE * max(1.0, abs(difference)):
        raise Broken(
            f"along a random direction its gates change by {difference:.6g} (a finite difference, in float64), and the "
            f"gradient says {along:.6g}: let the gradient flow through all that the plan's weight is computed from"
        )


@check
def auxiliary_losses(subject: Subject) -> None:
    """Every auxiliary loss reaches the router's parameters."""
    router = subject.build()
    if not router.loss_coefficients:
        raise NotAsked("it has no auxiliary losses")
    size = 40 * subject.scale
    plan = router(*subject.tokens(size), groups_of(size))
    finished = {name: finish_step_loss(part, part.demand, size) for name, part in plan.step_losses.items()}
    for name, value in {**plan.losses, **finished}.items():
        found: tuple[Tensor | None, ...] = ()
        if value.requires_grad:
            found = torch.autograd.grad(value, list(router.parameters()), retain_graph=True, allow_unused=True)
        if not any(gradient is not None and bool(gradient.any()) for gradient in found):
            raise Broken(
                f"its {name} of {value.item():.6g} gives no parameter a gradient: compute it from probabilities that "
                "are not detached, since counts have none"
            )
