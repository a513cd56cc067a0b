"""Hash layers (Roller et al. 2021, arXiv 2106.04426): routing by the token's id, nothing to learn.

Shapes: T tokens, V vocabulary, E experts.
"""

import heapq
from typing import ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router

VARIANTS = ("balanced", "random")


class Hash(Router):
    """Each token goes to the expert that a fixed table names for its id, with weight 1.

    Args:
        num_experts: E.
        vocab_size: V.
        variant: ``balanced`` deals the vocabulary out by frequency in the training text, from the most frequent token
            on, each to the expert with the least so far; until ``prepare`` has told the frequencies it is round-robin
            by id. ``random`` draws the table.
    """

    table: Tensor
    refused_options: ClassVar[dict[str, str]] = {
        "top_k": "it sends every token to one expert",
        "renormalize": "its gate is always 1",
        "capacity_factor": "its table is fixed, and dropping would hide how even that is",
        "balance_scope": "it has nothing to learn and no load-balancing loss",
    }

    def __init__(self, *, num_experts: int, vocab_size: int, variant: str = "balanced") -> None:
        super().__init__(num_experts=num_experts)
        if variant not in VARIANTS:
            raise ValueError(f"router.variant={variant}: choose one of {', '.join(VARIANTS)}")
        if num_experts > vocab_size:
            raise ValueError(
                f"router.num_experts={num_experts} exceeds the {vocab_size} tokens of the vocabulary, so that experts "
                "would never get any: use fewer experts or a larger data.vocab_size"
            )
        self.variant = variant
        self.register_buffer("table", torch.arange(vocab_size) % num_experts)
        self.reset_parameters()

    @property
    def needs_token_ids(self) -> bool:
        return True

    def reset_parameters(self) -> None:
        if self.variant == "random":
            self.table.copy_(torch.randint(self.num_experts, (len(self.table),)))

    def prepare(self, token_counts: Int64[Tensor, " V"]) -> None:
        if self.variant == "balanced":
            self.table.copy_(balanced_table(token_counts.tolist(), self.num_experts))

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        token_index = torch.arange(len(tokens), device=tokens.device)
        expert_index = self.table[token_ids]
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=tokens.new_ones(len(tokens)),
            group_demand=count_by_group(groups, self.num_experts, token_index, expert_index),
            groups=groups,
        )


def balanced_table(token_counts: list[int], num_experts: int) -> Int64[Tensor, " V"]:
    """The expert of every token: from the most to the least frequent, each to the expert with the smallest total.

    Ties go to the smaller id, of tokens and of experts. Tokens that the training text lacks add nothing to a total, and
    all of them would go to one expert: they are dealt out in turn.
    """
    by_frequency = sorted(range(len(token_counts)), key=lambda token: (-token_counts[token], token))
    totals = [(0, expert) for expert in range(num_experts)]
    table = [0] * len(token_counts)
    unseen = 0
    for token in by_frequency:
        if token_counts[token]:
            total, table[token] = totals[0]
            heapq.heapreplace(totals, (total + token_counts[token], table[token]))
        else:
            table[token] = unseen % num_experts
            unseen += 1
    return torch.tensor(table, dtype=torch.int64)
