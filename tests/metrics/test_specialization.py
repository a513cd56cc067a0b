"""Specialization, co-activation and saturation: known answers by hand, and recounts with plain Python."""

import math
from collections.abc import Callable

import pytest
import torch
from hand_made_plans import make_plan
from hypothesis import given
from hypothesis import strategies as st

from lightning_base.metrics import specialization as measured
from lightning_base.metrics.specialization import (
    Choices,
    attracted,
    choices_of,
    coactivation,
    concentration,
    information,
    label_counts,
    label_totals,
    lift,
    pair_counts,
    saturation,
    shuffled,
    specialization,
    switch_fraction,
)


def chosen(*experts: tuple[int, ...], num_experts: int = 4) -> Choices:
    """The experts of each token, in this order."""
    pairs = [(token, expert) for token, found in enumerate(experts) for expert in found]
    return Choices(
        token_index=torch.tensor([token for token, _ in pairs], dtype=torch.int64),
        expert_index=torch.tensor([expert for _, expert in pairs], dtype=torch.int64),
        num_tokens=len(experts),
        num_experts=num_experts,
        asked=len(pairs),
    )


def rows(tensor: torch.Tensor) -> list[list[float]]:
    return [[None if math.isnan(x) else round(x, 9) for x in line] for line in tensor.tolist()]


def test_plans_are_numbered_through_and_drops_are_left_out() -> None:
    first = make_plan([[(0, 1), (1, 0)]], (2,), 2)
    second = make_plan([[(0, 1), (1, 1)]], (2,), 2, dropped=[(1, 1)])
    both = choices_of([first, second])
    assert both.token_index.tolist() == [0, 1, 2]
    assert both.expert_index.tolist() == [1, 0, 1]
    assert (both.num_tokens, both.num_experts, both.asked) == (4, 2, 4)
    assert both.load.tolist() == [1, 2]
    assert both.per_token.tolist() == [1, 1, 1, 0]


def test_no_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="no routing plan"):
        choices_of([])


# Five tokens of labels a a a b b at experts 0 0 1, 1 1; the third label never occurs.
LABELS = torch.tensor([0, 0, 0, 1, 1])
SPREAD = chosen((0,), (0,), (1,), (1,), (1,), num_experts=2)


def test_specialization_is_the_share_of_a_label_at_each_expert() -> None:
    counts, totals = label_counts(SPREAD, LABELS, 3), label_totals(LABELS, 3)
    assert counts.tolist() == [[2, 0, 0], [1, 2, 0]]
    assert totals.tolist() == [3, 2, 0]
    # Not N(i, label)/N(i), which would be 1 for expert 0; and nothing can be said of a label that does not occur.
    assert rows(specialization(counts, totals)) == [[round(2 / 3, 9), 0, None], [round(1 / 3, 9), 1, None]]


def test_with_two_experts_per_token_the_shares_of_a_label_add_up_to_two() -> None:
    choices = chosen((0, 1), (1, 2), (0, 3))
    shares = specialization(label_counts(choices, torch.zeros(3, dtype=torch.int64), 1), torch.tensor([3]))
    assert shares.sum().item() == pytest.approx(2)
    # The reference is k/E = 2/4: what even loads would give.
    assert shares.mean().item() == pytest.approx(0.5)


def test_a_token_without_a_label_counts_nowhere() -> None:
    labels = torch.tensor([0, -1, 0, 1, -1])
    assert label_counts(SPREAD, labels, 2).tolist() == [[1, 0], [1, 1]]
    assert label_totals(labels, 2).tolist() == [2, 1]


def test_a_dropped_token_counts_for_its_label_but_at_no_expert() -> None:
    choices = chosen((0,), (), num_experts=2)
    counts, totals = label_counts(choices, torch.tensor([0, 0]), 1), torch.tensor([2])
    assert rows(specialization(counts, totals)) == [[0.5], [0]]


def test_information_by_hand() -> None:
    # The label tells the expert.
    assert information(torch.tensor([[3, 0], [0, 5]])) == pytest.approx(1)
    # The label tells nothing.
    assert information(torch.tensor([[2, 4], [1, 2]])) == pytest.approx(0, abs=1e-12)
    # Counts 2 1 / 0 1 of four tokens. H(expert) of (3/4, 1/4); given label 0 it is certain, given label 1 one bit; so
    # I = H(expert) - 1/2 ln 2.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert information(torch.tensor([[2, 1], [0, 1]])) == pytest.approx(1 - 0.5 * math.log(2) / entropy)
    assert math.isnan(information(torch.tensor([[4, 3], [0, 0]])))


def test_concentration_is_how_often_the_favourite_expert_of_a_label_is_right() -> None:
    counts, totals = label_counts(SPREAD, LABELS, 3), label_totals(LABELS, 3)
    # Label a: 2 of 3 at expert 0. Label b: 2 of 2 at expert 1. Together 4 of 5; of labels of 3 tokens on, 2 of 3.
    assert concentration(counts, totals) == pytest.approx(4 / 5)
    assert concentration(counts, totals, least=3) == pytest.approx(2 / 3)
    assert math.isnan(concentration(counts, totals, least=4))


def test_shuffled_labels_are_the_same_labels_elsewhere_and_again_the_same_for_the_same_seed() -> None:
    labels = torch.arange(50)
    mixed = shuffled(labels, seed=3)
    assert sorted(mixed.tolist()) == labels.tolist()
    assert mixed.tolist() != labels.tolist()
    assert torch.equal(mixed, shuffled(labels, seed=3))


def test_lift_is_relative_to_the_frequency_in_the_text() -> None:
    # Expert 0 sees a a, expert 1 sees a b b. a is 3/5 of the text and all of expert 0: 5/3; 1/3 of expert 1: 5/9.
    # b is 2/5 of the text and 2/3 of expert 1: 5/3.
    counts, totals = label_counts(SPREAD, LABELS, 3), label_totals(LABELS, 3)
    assert rows(lift(counts, totals)) == [[round(5 / 3, 9), 0, None], [round(5 / 9, 9), round(5 / 3, 9), None]]


def test_an_expert_attracts_by_lift_then_by_count_and_never_what_it_has_less_of() -> None:
    counts = torch.tensor([[10, 20, 1, 5], [0, 0, 99, 5]])
    totals = counts.sum(0)
    # Labels 0 and 1 are only at expert 0 and have equal lift: the more frequent one first. Label 3 is a share of 5/36
    # at expert 0 and of 5/104 at expert 1, and of 10/140 in the text: lifts of 1.94 and 0.67.
    assert attracted(counts, totals, least=1, most=9) == [[1, 0, 3], [2]]
    assert attracted(counts, totals, least=1, most=1) == [[1], [2]]
    assert attracted(counts, totals, least=11, most=9) == [[1], [2]]


# Tokens at the experts {0, 1, 2}, {0, 2}, {1}: the pair (0, 2) occurs twice, once with 1 in between.
THREE = chosen((0, 1, 2), (0, 2), (1,))
EXPECTED = [
    [1, 1 / 2, 1, 0],
    [1 / 2, 1, 1 / 2, 0],
    [1, 1 / 2, 1, 0],
    [None, None, None, None],
]


def check_coactivation(function: Callable[[Choices], torch.Tensor]) -> None:
    assert rows(function(THREE)) == EXPECTED


def adjacent_ranks_only(choices: Choices) -> torch.Tensor:
    """The published mistake: a token's first and second expert, second and third, but not first and third."""
    pairs = torch.diag(choices.load).double()
    for a in range(len(choices.token_index) - 1):
        if choices.token_index[a] == choices.token_index[a + 1]:
            i, j = choices.expert_index[a], choices.expert_index[a + 1]
            pairs[i, j] += 1
            pairs[j, i] += 1
    return pairs / pairs.diagonal()[:, None]


def test_coactivation_has_its_known_answer() -> None:
    check_coactivation(coactivation)


def test_the_test_catches_coactivation_counted_over_adjacent_ranks_only() -> None:
    with pytest.raises(AssertionError):
        check_coactivation(adjacent_ranks_only)


def test_coactivation_is_divided_by_the_expert_of_its_row() -> None:
    # Expert 0 has three tokens, expert 1 one of them: all of 1 is with 0, a third of 0 with 1.
    shares = coactivation(chosen((0, 1), (0,), (0,), num_experts=2))
    assert rows(shares) == [[1, round(1 / 3, 9)], [1, 1]]


def test_saturation_is_the_overlap_with_the_end_and_switching_the_change_of_sets() -> None:
    now = chosen((0, 1), (2, 3), (0, 2), (1, 0))
    end = chosen((0, 1), (0, 1), (0, 3), (0, 1))
    # Overlaps 2, 0, 1 and 2 of 2; the order of a token's experts is no change.
    assert saturation(now, end) == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert switch_fraction(now, end) == pytest.approx(2 / 4)
    assert saturation(end, end) == 1
    assert switch_fraction(end, end) == 0


def test_a_token_that_was_dropped_at_one_of_two_times_is_not_compared() -> None:
    now, end = chosen((0,), (), (1,), num_experts=2), chosen((0,), (1,), (), num_experts=2)
    assert saturation(now, end) == 1
    assert switch_fraction(now, end) == 0
    assert math.isnan(saturation(chosen((), num_experts=2), chosen((0,), num_experts=2)))
    assert math.isnan(switch_fraction(chosen((), num_experts=2), chosen((0,), num_experts=2)))


def test_a_token_that_loses_one_of_two_experts_has_changed_them() -> None:
    one, two = chosen((0,)), chosen((0, 1))
    assert switch_fraction(two, one) == switch_fraction(one, two) == 1
    # All of what it has at the end, it had before; the other way round only half.
    assert saturation(two, one) == 1
    assert saturation(one, two) == 0.5


def test_choices_about_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens at 4 experts cannot be compared with 1 tokens at 4 experts"):
        saturation(chosen((0,), (1,)), chosen((0,)))


sets_of_experts = st.lists(st.sets(st.integers(0, 4), max_size=5), min_size=1, max_size=12)


@given(sets_of_experts, st.randoms())
def test_counts_agree_with_a_recount_whatever_the_order_of_the_assignments(
    experts: list[set[int]], random: object
) -> None:
    choices = chosen(*map(tuple, experts), num_experts=5)
    order = list(range(len(choices.token_index)))
    random.shuffle(order)
    mixed = Choices(choices.token_index[order], choices.expert_index[order], len(experts), 5, choices.asked)
    pairs = [[sum(i in found and j in found for found in experts) for j in range(5)] for i in range(5)]
    assert pair_counts(mixed).tolist() == pairs
    end = [set(found) for found in [*experts[1:], experts[0]]]
    compared = [(a, b) for a, b in zip(experts, end, strict=True) if a and b]
    if compared:
        final = chosen(*map(tuple, end), num_experts=5)
        assert saturation(mixed, final) == pytest.approx(sum(len(a & b) / len(b) for a, b in compared) / len(compared))
        assert switch_fraction(mixed, final) == pytest.approx(sum(a != b for a, b in compared) / len(compared))


def test_pairs_are_the_same_however_many_tokens_are_laid_out_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = chosen(*[(t % 4, (t // 4 + t) % 4) if t // 4 % 4 else (t % 4,) for t in range(64)])
    whole = pair_counts(choices)
    monkeypatch.setattr(measured, "BLOCK", 7)
    assert torch.equal(pair_counts(choices), whole)
    assert whole.diagonal().tolist() == choices.load.tolist()
