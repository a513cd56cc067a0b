"""Routing plans written down by hand."""

import torch

from lightning_base.routing import RoutingGroups, RoutingPlan

Pairs = list[tuple[int, int]]


def make_plan(
    asked: list[Pairs],
    sizes: tuple[int, ...],
    num_experts: int,
    *,
    dropped: Pairs = (),
    top_k: int = 1,
    capacity: list[int] | None = None,
    gate: float = 0.5,
    probabilities: list[list[float]] | None = None,
) -> RoutingPlan:
    """A plan from the (token, expert) pairs asked for in each group, less those dropped."""
    demand = [[sum(expert == e for _, expert in pairs) for e in range(num_experts)] for pairs in asked]
    kept = [pair for pairs in asked for pair in pairs if pair not in dropped]
    return RoutingPlan(
        token_index=torch.tensor([token for token, _ in kept], dtype=torch.int64),
        expert_index=torch.tensor([expert for _, expert in kept], dtype=torch.int64),
        weight=torch.full((len(kept),), gate),
        group_demand=torch.tensor(demand, dtype=torch.int64).view(len(sizes), num_experts),
        groups=RoutingGroups(sizes),
        top_k=top_k,
        capacity=None if capacity is None else torch.tensor(capacity),
        aux={} if probabilities is None else {"probabilities": torch.tensor(probabilities)},
    )


def plan_of_counts(counts: list[int], **options: object) -> RoutingPlan:
    """One group in which expert e is asked by counts[e] tokens."""
    experts = [e for e, count in enumerate(counts) for _ in range(count)]
    return make_plan([list(enumerate(experts))], (len(experts),), len(counts), **options)
