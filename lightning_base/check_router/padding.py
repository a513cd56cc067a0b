"""Padding, which a layer takes out before its router sees the tokens; a router is told how long each sequence was.

Shapes: B sequences, L positions, D width.
"""

import copy

import torch
from torch import Tensor

from lightning_base.check_router.check import Broken, check
from lightning_base.check_router.subject import (
    Subject,
    decisions,
    first_difference,
    other_loss,
    route,
    seeded,
    told,
    width_for,
)
from lightning_base.moe import Experts, SparseLayer
from lightning_base.routing.plan import RoutingGroups, RoutingPlan
from lightning_base.routing.router import Router

# The last sequence is all padding, the third all tokens; groups are of two.
LENGTHS = (5, 2, 9, 0)


@check
def padding(subject: Subject) -> None:
    """Padding is routed nowhere, and how much of it there is changes nothing for other tokens."""
    lengths = tuple(length * subject.scale for length in LENGTHS)
    first, second = lengths[0] + lengths[1], lengths[2]
    for way, router in subject.ways():
        tokens, ids = subject.tokens(first + second)
        # A sequence that is all padding holds nothing that could matter.
        with_padding = RoutingGroups((first, second), lengths)
        without = RoutingGroups((first, second), lengths[:3])
        padded, plain = (route(router, tokens, ids, groups) for groups in (with_padding, without))
        unmoved(router, padded, plain, f"in {way}, when a sequence that is all padding was added,")
        through_a_layer(subject, router, way, lengths)


def unmoved(router: Router, padded: RoutingPlan, plain: RoutingPlan, given: str) -> None:
    """Raises ``Broken`` unless a sequence without tokens has changed nothing."""
    advice = "count the tokens it was given, and no sequences times their length"
    before, after = decisions(plain), decisions(padded)
    token = first_difference(before, after)
    if token is not None:
        raise Broken(f"{given} token {token} went from {told(before[token])} to {told(after[token])}: {advice}")
    changed = other_loss(plain, padded)
    if changed:
        raise Broken(f"{given} {changed}: {advice}")
    for name in ("group_demand", "capacity", "equal_loads"):
        one, other = (
            value.tolist() if isinstance(value, Tensor) else value
            for value in (getattr(plain, name), getattr(padded, name))
        )
        if one != other:
            raise Broken(f"{given} {name} went from {one} to {other}: {advice}")
    for name, value in router.step_sums(plain.detached()).items() if router.training else ():
        other = router.step_sums(padded.detached())[name]
        if not torch.allclose(value.double(), other.double()):
            raise Broken(f"{given} step_sums gave {name}={other.tolist()} instead of {value.tolist()}: {advice}")


def through_a_layer(subject: Subject, router: Router, way: str, lengths: tuple[int, ...]) -> None:
    layer, length = layer_of(router), max(lengths)
    hidden, ids = subject.tokens(len(lengths) * length)
    hidden, ids = hidden.view(len(lengths), length, -1), ids.view(len(lengths), length)
    valid = torch.arange(length) < torch.tensor(lengths)[:, None]
    with seeded():
        output, plan = copy.deepcopy(layer)(hidden, ids, valid)
    if plan.groups.num_tokens != int(valid.sum()):
        raise Broken(f"in {way}, of {int(valid.sum())} tokens with padding between, the plan is of {plan.num_tokens}")
    if not torch.equal(output[~valid], hidden[~valid]):
        raise Broken(f"in {way}, padding did not pass through unchanged: some of it was given to an expert")
    other_hidden, other_ids = hidden.clone(), ids.clone()
    other_hidden[~valid], other_ids[~valid] = 100.0, 7
    with seeded():
        other, _ = copy.deepcopy(layer)(other_hidden, other_ids, valid)
    if not torch.equal(other[valid], output[valid]):
        raise Broken(f"in {way}, another content of the padding changed what the other tokens became")
    if router.training:
        nothing(layer, hidden, ids)


def nothing(layer: SparseLayer, hidden: Tensor, ids: Tensor) -> None:
    """A batch that is all padding: DistributedDataParallel waits for the gradient of every parameter."""
    hidden = hidden.clone().requires_grad_()
    output, plan = layer(hidden, ids, torch.zeros(ids.shape, dtype=torch.bool))
    (output.sum() + sum(plan.losses.values())).backward()
    for name, parameter in layer.router.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or bool(parameter.grad.any())):
            raise Broken(
                f"in training, given nothing but padding, the gradient of {name} is "
                f"{'missing' if parameter.grad is None else 'not zero'}: it should be zero, since ranks wait for the "
                "gradient of every parameter"
            )


def layer_of(router: Router, seed: int = 1) -> SparseLayer:
    """A layer around a copy of the router, whose experts all do something; it routes two sequences together."""
    width = width_for(router.num_experts)
    experts = Experts(num_experts=router.num_experts, width=width, hidden_width=24)
    generator = torch.Generator().manual_seed(seed)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return SparseLayer(copy.deepcopy(router), experts, routing_group=2)
