"""RoutingPlan: the one contract between the routers and everything else.

Shapes: A assignments kept, T tokens, E experts, G routing groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor


@dataclass(frozen=True)
class RoutingGroups:
    """Which tokens are routed together: group g holds ``sizes[g]`` consecutive tokens.

    Balance, capacities and load-balancing losses are computed inside one group, so that they do not depend on how many
    groups a rank happens to hold.

    Args:
        sizes: tokens of each group.
        sequences: tokens of each sequence, several of which make a group; without them, a group is one sequence.
    """

    sizes: tuple[int, ...]
    sequences: tuple[int, ...] = field(default=(), compare=False)

    @property
    def num_tokens(self) -> int:
        return sum(self.sizes)

    def index(self, device: torch.device | str = "cpu") -> Int64[Tensor, " T"]:
        """The group of every token, [T]."""
        groups = torch.arange(len(self.sizes), device=device)
        if self.even:
            return groups.repeat_interleave(self.sizes[0] if self.sizes else 1)
        sizes = torch.tensor(self.sizes, device=device, dtype=torch.int64)
        return groups.repeat_interleave(sizes, output_size=self.num_tokens)

    @property
    def even(self) -> bool:
        """All groups hold the same number of tokens, as they do without padding: then a device need not be told."""
        return self.sizes.count(self.sizes[0]) == len(self.sizes) if self.sizes else True

    @property
    def held(self) -> int:
        """Groups that hold tokens."""
        return sum(size > 0 for size in self.sizes)

    def even_over(self, num_experts: int, top_k: int = 1) -> bool:
        """Whether equal shares of the assignments of every group are whole numbers."""
        return all(size * top_k % num_experts == 0 for size in self.sizes)

    def sum(self, value_TN: Float[Tensor, "T N"]) -> Float[Tensor, "G N"]:
        """The sum over the tokens of each group."""
        if not self.sizes:
            return value_TN.new_zeros(0, value_TN.shape[1])
        if self.even:
            return value_TN.unflatten(0, (len(self.sizes), self.sizes[0])).sum(1)
        return torch.stack([part.sum(0) for part in self.split(value_TN)])

    def split(self, tokens: Shaped[Tensor, "T *rest"]) -> Sequence[Tensor]:
        """One view per group."""
        return tokens.split(self.sizes)

    def by_sequence(self) -> "RoutingGroups":
        """The same tokens with every sequence a group of its own."""
        return RoutingGroups(self.sequences or self.sizes)

    def starts(self) -> list[int]:
        """The first token of each group."""
        return [0, *accumulate(self.sizes)][:-1]


@dataclass(frozen=True)
class StepLoss:
    """What one forward pass adds to a load-balancing loss over a whole optimizer step, of all ranks.

    The loss needs the counts of the whole step, which a router cannot know: the module sums them and finishes the loss
    with ``losses.finish_step_loss``.

    Args:
        demand: [E], assignments that asked for each expert.
        probability_sum: [E], gate probabilities summed over tokens; the gradient flows through it.
        num_tokens: T.
    """

    demand: Int64[Tensor, " E"]
    probability_sum: Float[Tensor, " E"]
    num_tokens: int


@dataclass(frozen=True)
class RoutingPlan:
    """What a router decided about T tokens and E experts, as a flat list of A assignments.

    Top-1, top-k, dropped tokens and expert choice are all the same thing to the rest of the code: a token with no
    assignment is left behind, one with several is combined by weight.

    Args:
        token_index: [A], which token.
        expert_index: [A], to which expert.
        weight: [A], the gate of the assignment; the router's gradient flows through it.
        group_demand: [G, E], assignments that asked for each expert in each routing group, before any drop.
        groups: the routing groups of the T tokens.
        top_k: experts that every token asks for (the k of the load formulas).
        capacity: [G], slots of one expert in each group; None if nothing is ever dropped.
        equal_loads: every expert computes equally many tokens, and would of any tokens in groups of these sizes: ranks
            with the same sizes need not tell each other their counts.
        losses: auxiliary losses by name, not yet multiplied by a coefficient: the module owns those.
        step_losses: the same for losses over the whole optimizer step; a loss is in one of the two.
        aux: detached tensors that a callback may want to look at. By these names they are understood:
            ``probabilities`` [T, E], a gate distribution of each token; ``gates``, the sigmoids of the experts chosen,
            before they are renormalized; ``assignment_seconds``, the time that choosing in balance took; ``asked`` [T],
            of how many experts each token asked, where that is not k; ``computed``, how many assignments the experts of
            this rank have computed, where these are not those of the plan.
    """

    token_index: Int64[Tensor, " A"]
    expert_index: Int64[Tensor, " A"]
    weight: Float[Tensor, " A"]
    group_demand: Int64[Tensor, "G E"]
    groups: RoutingGroups
    top_k: int = 1
    capacity: Int64[Tensor, " G"] | None = None
    equal_loads: bool = False
    losses: dict[str, Tensor] = field(default_factory=dict)
    step_losses: dict[str, StepLoss] = field(default_factory=dict)
    aux: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.groups.num_tokens

    @property
    def num_experts(self) -> int:
        return self.group_demand.shape[1]

    @property
    def demand(self) -> Int64[Tensor, " E"]:
        """Tokens that asked for each expert, before any drop, [E]."""
        return self.group_demand.sum(0)

    @property
    def asked(self) -> Int64[Tensor, ""]:
        """Assignments asked for, a scalar: T k, unless a router lets some tokens ask for fewer."""
        return self.group_demand.sum()

    @property
    def group_load(self) -> Int64[Tensor, "G E"]:
        """Tokens that each expert computes in each routing group, after the drop, [G, E]."""
        return count_by_group(self.groups, self.num_experts, self.token_index, self.expert_index)

    @property
    def load(self) -> Int64[Tensor, " E"]:
        """Tokens that each expert computes, after the drop, [E]."""
        return count(self.expert_index, self.num_experts)

    @property
    def tokens_left_behind(self) -> Int64[Tensor, ""]:
        """Tokens without any expert, a scalar."""
        reached = torch.zeros(self.num_tokens, dtype=torch.int64, device=self.token_index.device)
        reached[self.token_index] = 1
        return self.num_tokens - reached.sum()

    def of_experts(self, held: range) -> "RoutingPlan":
        """The assignments to some of the experts alone, which are then 0, 1, ..."""
        theirs = (self.expert_index >= held.start) & (self.expert_index < held.stop)
        return replace(
            self,
            token_index=self.token_index[theirs],
            expert_index=self.expert_index[theirs] - held.start,
            weight=self.weight[theirs],
            group_demand=self.group_demand[:, held.start : held.stop],
            equal_loads=False,
        )

    def detached(self) -> "RoutingPlan":
        """The same plan without its graph: what may outlive the step."""
        losses = {name: loss.detach() for name, loss in self.losses.items()}
        return replace(self, weight=self.weight.detach(), losses=losses, step_losses={})


def count_by_group(
    groups: RoutingGroups,
    num_experts: int,
    token_index: Int64[Tensor, " A"],
    expert_index: Int64[Tensor, " A"],
) -> Int64[Tensor, "G E"]:
    """Assignments per routing group and expert, [G, E]."""
    num_groups = len(groups.sizes)
    flat = groups.index(token_index.device)[token_index] * num_experts + expert_index
    return count(flat, num_groups * num_experts).view(num_groups, num_experts)


def count(index: Int64[Tensor, " N"], size: int) -> Int64[Tensor, " size"]:
    """How often each of 0 ... size - 1 occurs.

    ``torch.bincount`` looks for the largest first: a GPU's host would wait for it, and a compiler cannot know the size.
    """
    return index.new_zeros(size).scatter_add_(0, index, torch.ones_like(index))
