"""What experts specialise in and when that settles: pure functions over which token went to which expert.

Loads are counted after the drop: what was computed. Shares are NaN where there is nothing to take a share of.

Shapes: A assignments, T tokens, E experts, L labels (of a domain, or of a token of the vocabulary).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from lightning_base.routing.plan import RoutingPlan

# The label of a token that has none: it is left out of every count.
UNLABELLED = -1

# Tokens whose experts are laid out as a table [tokens, E] at a time.
BLOCK = 1 << 15


@dataclass(frozen=True)
class Choices:
    """Which token went to which experts, over any number of routing plans.

    Args:
        token_index: [A], from 0 to T - 1.
        expert_index: [A].
        num_tokens: T.
        num_experts: E.
        asked: assignments asked for before any drop; A if nothing was dropped.
    """

    token_index: Int64[Tensor, " A"]
    expert_index: Int64[Tensor, " A"]
    num_tokens: int
    num_experts: int
    asked: int

    @property
    def load(self) -> Int64[Tensor, " E"]:
        """Assignments of each expert, N(i)."""
        return torch.bincount(self.expert_index, minlength=self.num_experts)

    @property
    def per_token(self) -> Int64[Tensor, " T"]:
        """Experts of each token: k, or fewer after drops."""
        return torch.bincount(self.token_index, minlength=self.num_tokens)

    @property
    def keys(self) -> Int64[Tensor, " A"]:
        """One number per assignment, equal for the same token at the same expert."""
        return self.token_index * self.num_experts + self.expert_index


def choices_of(plans: Sequence[RoutingPlan]) -> Choices:
    """The assignments of several plans of one layer, tokens numbered through.

    Raises:
        ValueError: no plan at all.
    """
    if not plans:
        raise ValueError("no routing plan was given: at least one is needed")
    tokens, first = [], 0
    for plan in plans:
        tokens.append(plan.token_index + first)
        first += plan.num_tokens
    return Choices(
        token_index=torch.cat(tokens),
        expert_index=torch.cat([plan.expert_index for plan in plans]),
        num_tokens=first,
        num_experts=plans[0].num_experts,
        asked=sum(int(plan.asked) for plan in plans),
    )


def label_counts(choices: Choices, labels_T: Int64[Tensor, " T"], num_labels: int) -> Int64[Tensor, "E L"]:
    """N(i, label): assignments of each expert by the label of their token."""
    label_A = labels_T[choices.token_index]
    known_A = label_A != UNLABELLED
    flat = choices.expert_index[known_A] * num_labels + label_A[known_A]
    return torch.bincount(flat, minlength=choices.num_experts * num_labels).view(choices.num_experts, num_labels)


def label_totals(labels_T: Int64[Tensor, " T"], num_labels: int) -> Int64[Tensor, " L"]:
    """N(label): tokens of each label, whether an expert took them or not."""
    return torch.bincount(labels_T[labels_T != UNLABELLED], minlength=num_labels)


def specialization(counts_EL: Int64[Tensor, "E L"], totals_L: Int64[Tensor, " L"]) -> Float64[Tensor, "E L"]:
    """N(i, label)/N(label): the share of a label's tokens that expert i takes (OLMoE, arXiv 2409.02060).

    Where experts do not depend on the label, and are equally loaded, every share is k/E.
    """
    return counts_EL.double() / or_nan(totals_L)


def concentration(counts_EL: Int64[Tensor, "E L"], totals_L: Int64[Tensor, " L"], least: int = 1) -> float:
    """Share of the tokens that reach the favourite expert of their label: how far the label tells the expert.

    The mean over tokens of max_i N(i, label)/N(label). With k = 1 it is how often a guess of the expert from the label
    alone is right. Chance is not k/E but more, because the favourite is chosen afterwards: compare with `shuffled`.

    Args:
        counts_EL: N(i, label).
        totals_L: N(label).
        least: labels of fewer tokens are left out.
    """
    held_L = totals_L >= max(1, least)
    return float(counts_EL.amax(0)[held_L].sum().double() / or_nan(totals_L[held_L].sum()))


def information(counts_EL: Int64[Tensor, "E L"]) -> float:
    """How much of the assignment a label explains: I(expert; label) / H(expert), from 0 to 1.

    Mutual information normalised by the entropy of the expert. 1: the label tells the expert; 0: it tells nothing. Few
    tokens per label look like information: compare with labels that are `shuffled`. NaN if one expert has all tokens.
    """
    joint_EL = counts_EL.double() / or_nan(counts_EL.sum())
    entropies = [-float(torch.special.xlogy(p, p).sum()) for p in (joint_EL.sum(1), joint_EL.sum(0), joint_EL)]
    expert, label, both = entropies
    return (expert + label - both) / expert if expert > 0 else float("nan")


def shuffled(labels_T: Int64[Tensor, " T"], seed: int = 0) -> Int64[Tensor, " T"]:
    """The same labels given to random tokens: the control under which no expert can know a label."""
    order_T = torch.randperm(len(labels_T), generator=torch.Generator().manual_seed(seed))
    return labels_T[order_T.to(labels_T.device)]


def lift(counts_EL: Int64[Tensor, "E L"], totals_L: Int64[Tensor, " L"]) -> Float64[Tensor, "E L"]:
    """How many times more frequent a label is at expert i than in the text: (N(i, label)/N(i)) / (N(label)/N)."""
    at_expert_EL = counts_EL.double() / or_nan(counts_EL.sum(1, keepdim=True))
    return at_expert_EL / (or_nan(totals_L) / or_nan(totals_L.sum()))


def attracted(
    counts_EL: Int64[Tensor, "E L"], totals_L: Int64[Tensor, " L"], *, least: int, most: int
) -> list[list[int]]:
    """For each expert the labels it attracts most: of highest lift, of equal lift those it takes more often.

    The kind of table 1 of the BASE paper (arXiv 2103.16716).

    Args:
        counts_EL: N(i, label).
        totals_L: N(label).
        least: labels of fewer tokens are left out: a word seen once is at some expert by chance.
        most: how many labels per expert; fewer if it attracts fewer, that is, with a lift above 1.
    """
    lift_EL = lift(counts_EL, totals_L)
    found = []
    for lift_L, count_L in zip(lift_EL, counts_EL, strict=True):
        candidates = ((totals_L >= max(1, least)) & (lift_L > 1)).nonzero().squeeze(1).tolist()
        # Rounded, so that equal lifts are equal whatever they were divided by; the label decides last.
        ranked = sorted(candidates, key=lambda j: (-round(float(lift_L[j]), 9), -int(count_L[j]), j))
        found.append(ranked[:most])
    return found


def pair_counts(choices: Choices) -> Int64[Tensor, "E E"]:
    """N(i and j): tokens that went to both experts, over all pairs; N(i) on the diagonal."""
    pairs_EE = torch.zeros(choices.num_experts, choices.num_experts, dtype=torch.float64)
    for member_BE in membership(choices):
        pairs_EE += member_BE.T @ member_BE
    return pairs_EE.round().to(torch.int64)


def coactivation(choices: Choices) -> Float64[Tensor, "E E"]:
    """N(i and j)/N(i), row i, column j: how many of expert i's tokens expert j has too (OLMoE, arXiv 2409.02060).

    All pairs of a token's experts count, not only neighbours in the order of their scores.
    """
    pairs_EE = pair_counts(choices)
    return pairs_EE.double() / or_nan(pairs_EE.diagonal())[:, None]


def saturation(choices: Choices, final: Choices) -> float:
    """Mean over tokens of the share of their experts at the end that they had already (OLMoE, arXiv 2409.02060).

    |chosen now and at the end| / |chosen at the end|, over tokens with an expert at both times. 1: routing has settled.

    Raises:
        ValueError: the two are not about the same tokens and experts.
    """
    check_alike(choices, final)
    now_T, end_T = choices.per_token, final.per_token
    compared_T = (now_T > 0) & (end_T > 0)
    shared_T = kept(choices, final)
    share_T = shared_T[compared_T].double() / end_T[compared_T]
    return float(share_T.mean()) if len(share_T) else float("nan")


def switch_fraction(before: Choices, after: Choices) -> float:
    """Share of the tokens whose experts are not the same set before and after, of those with an expert at both times.

    Raises:
        ValueError: the two are not about the same tokens and experts.
    """
    check_alike(before, after)
    before_T, after_T = before.per_token, after.per_token
    compared_T = (before_T > 0) & (after_T > 0)
    shared_T = kept(before, after)
    changed_T = (shared_T != before_T) | (shared_T != after_T)
    return float(changed_T[compared_T].double().mean()) if bool(compared_T.any()) else float("nan")


def kept(before: Choices, after: Choices) -> Int64[Tensor, " T"]:
    """How many of its experts each token has both times."""
    same_A = torch.isin(after.keys, before.keys)
    return torch.bincount(after.token_index[same_A], minlength=after.num_tokens)


def membership(choices: Choices) -> Iterator[Tensor]:
    """Tables [tokens, E] of 0 and 1, which token is at which expert, a block of tokens at a time."""
    order_A = choices.token_index.argsort(stable=True)
    token_A, expert_A = choices.token_index[order_A], choices.expert_index[order_A]
    for first in range(0, choices.num_tokens, BLOCK):
        size = min(BLOCK, choices.num_tokens - first)
        bounds = torch.searchsorted(token_A, torch.tensor([first, first + size])).tolist()
        here = slice(*bounds)
        member_BE = torch.zeros(size, choices.num_experts, dtype=torch.float64)
        member_BE[token_A[here] - first, expert_A[here]] = 1
        yield member_BE


def check_alike(one: Choices, other: Choices) -> None:
    """Raises ValueError unless both are about the same tokens and experts."""
    mine, theirs = (one.num_tokens, one.num_experts), (other.num_tokens, other.num_experts)
    if mine != theirs:
        raise ValueError(
            f"{mine[0]} tokens at {mine[1]} experts cannot be compared with {theirs[0]} tokens at {theirs[1]} experts"
        )


def or_nan(totals: Tensor) -> Tensor:
    """Totals to divide by: NaN where there is nothing."""
    n = totals.double()
    return torch.where(n > 0, n, torch.nan)
