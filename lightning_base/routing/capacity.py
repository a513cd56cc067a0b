"""Capacity: which assignments an expert with limited slots keeps.

Shapes: A assignments, G routing groups, E experts.
"""

import math

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from lightning_base.routing.plan import RoutingGroups, count


def check_capacity_factor(key: str, factor: float | None) -> None:
    """Raises ValueError unless ``factor`` is a finite number above 0, or None."""
    if factor is not None and not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"router.{key}={factor}: a capacity factor is a number above 0, or null to drop nothing")


def expert_capacity(groups: RoutingGroups, num_experts: int, top_k: int, capacity_factor: float) -> list[int]:
    """Slots of one expert in each group: ceil(capacity_factor * T k / E) (Fedus et al. 2021, eq. 3)."""
    # The product is rounded first: 1.1 * 10 is a hair over 11 in floating point and would buy a slot too many.
    return [math.ceil(round(capacity_factor * size * top_k / num_experts, 9)) for size in groups.sizes]


def serve(
    groups: RoutingGroups,
    token_index: Int64[Tensor, " A"],
    expert_index: Int64[Tensor, " A"],
    slots: list[int],
    num_experts: int,
) -> tuple[Int64[Tensor, " kept"], Int64[Tensor, " G"]]:
    """Which assignments are kept, in their order, and the slots of an expert in each group, on their device.

    Args:
        groups: the routing groups.
        token_index: [A], in the order in which they are served.
        expert_index: [A].
        slots: of one expert in each group, as ``expert_capacity`` gives them.
        num_experts: E.
    """
    # A single number goes to a GPU with the kernel that fills; a list would be copied, and the host would wait.
    even = bool(slots) and slots.count(slots[0]) == len(slots)
    capacity = token_index.new_full((len(slots),), slots[0]) if even else token_index.new_tensor(slots)
    group_index = groups.index(token_index.device)[token_index]
    # Not a mask: each use of one on a GPU would wait for the number of its ones.
    kept = within_capacity(group_index, expert_index, capacity, num_experts).nonzero().squeeze(1)
    return kept, capacity


def within_capacity(
    group_index: Int64[Tensor, " A"],
    expert_index: Int64[Tensor, " A"],
    capacity: Int64[Tensor, " G"],
    num_experts: int,
) -> Bool[Tensor, " A"]:
    """True for the assignments kept when each expert serves its queue in the given order, group by group.

    The order of the assignments is the priority: Switch and GShard serve by position in the group, all first choices
    before any second choice.
    """
    queue = group_index * num_experts + expert_index
    order = torch.argsort(queue, stable=True)
    sorted_queue = queue[order]
    counts = count(queue, len(capacity) * num_experts)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(queue)
    place[order] = torch.arange(len(queue), device=queue.device) - starts[sorted_queue]
    return place < capacity[group_index]
