"""Activation checkpointing: the forward pass is computed twice, and has to give and count the same."""

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from lightning_base.check_router.check import Broken, check
from lightning_base.check_router.padding import layer_of
from lightning_base.check_router.subject import Subject, decisions, first_difference, seeded, told
from lightning_base.drop_in import DropIn, auxiliary_loss, end_step
from lightning_base.routing.plan import RoutingPlan


@check
def recomputation(subject: Subject) -> None:
    """Computed again in the backward pass, it gives the same plan and gradients, and counts no token twice."""
    plain, _ = trained(subject, recomputed=False)
    again, plans = trained(subject, recomputed=True)
    first, second = (decisions(plan) for plan in plans)
    token = first_difference(first, second)
    if token is not None:
        raise Broken(
            f"computed again in the backward pass, token {token} had {told(second[token])} instead of "
            f"{told(first[token])}: forward may change nothing that it goes by, and noise comes from routing.noise"
        )
    for name, value in plain.items():
        if not torch.allclose(value.double(), again[name].double(), rtol=1e-4, atol=1e-6):
            raise Broken(
                f"with activation checkpointing {name} differs by "
                f"{float((value.double() - again[name].double()).abs().max()):.3g}: count in step_sums, which is asked "
                "once for each pass, and in forward change nothing"
            )


def trained(subject: Subject, *, recomputed: bool) -> tuple[dict[str, Tensor], list[RoutingPlan]]:
    """Gradients and buffers after one step of two passes, and the plans of the first."""
    with seeded():
        drop_in = DropIn(layer_of(subject.build()))
        plans: list[RoutingPlan] = []
        handle = drop_in.layer.router.register_forward_hook(lambda _module, _given, plan: plans.append(plan))
        for seed in range(2):
            hidden, ids = subject.tokens(40 * subject.scale, seed)
            hidden = hidden.view(4, 10 * subject.scale, -1).requires_grad_()
            ids = ids.view(4, -1)
            try:
                output = checkpoint(drop_in, hidden, ids, use_reentrant=False) if recomputed else drop_in(hidden, ids)
                (output.square().mean() + auxiliary_loss(drop_in)).backward()
            except CheckpointError as error:
                raise Broken(
                    "computed again in the backward pass, it took another way than at first: forward may change "
                    "nothing that it goes by, and noise comes from routing.noise"
                ) from error
            handle.remove()
        end_step(drop_in)
    gradients = {f"the gradient of {n}": p.grad for n, p in drop_in.named_parameters() if p.grad is not None}
    buffers = {f"the buffer {name}": buffer.clone() for name, buffer in drop_in.layer.router.named_buffers()}
    return {**gradients, **buffers}, plans
