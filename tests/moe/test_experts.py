"""Grouped and batched matmuls against a loop, and what the experts start from.

A assignments sorted by expert, M and N widths, E experts.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_base.moe import Experts
from lightning_base.moe.experts import expert_matmul


def by_loop(x_AM: torch.Tensor, weight_EMN: torch.Tensor, counts: list[int]) -> torch.Tensor:
    rows = [x @ weight_EMN[e] for e, part in enumerate(x_AM.split(counts)) for x in part]
    return torch.stack(rows) if rows else x_AM.new_zeros(0, weight_EMN.shape[2])


@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=5)
    | st.tuples(st.integers(1, 5), st.integers(0, 4)).map(lambda pair: [pair[1]] * pair[0]),
    seed=st.integers(0, 1_000),
)
def test_each_row_meets_the_matrix_of_its_expert(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_AM = torch.randn(sum(counts), 8, generator=generator, requires_grad=True)
    weight_EMN = torch.randn(len(counts), 8, 16, generator=generator, requires_grad=True)
    got = expert_matmul(x_AM, weight_EMN, torch.tensor(counts), len(set(counts)) == 1)
    expected = by_loop(x_AM, weight_EMN, counts)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(got.shape, generator=generator)
    got_gradients = torch.autograd.grad((got * upstream).sum(), [x_AM, weight_EMN])
    if expected.grad_fn is None:
        assert not any(bool(gradient.any()) for gradient in got_gradients)
    else:
        expected_gradients = torch.autograd.grad((expected * upstream).sum(), [x_AM, weight_EMN])
        torch.testing.assert_close(got_gradients, expected_gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("counts", [[4, 4, 4], [9, 0, 3], [0, 0, 0], [12]], ids=str)
def test_mixed_precision_is_the_same_for_equal_and_unequal_counts(counts: list[int]) -> None:
    x_AM, weight_EMN = torch.randn(sum(counts), 16), torch.randn(len(counts), 16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = expert_matmul(x_AM, weight_EMN, torch.tensor(counts), len(set(counts)) == 1)
    expected = by_loop(x_AM.bfloat16().float(), weight_EMN.bfloat16().float(), counts)
    assert got.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: half a unit in the last place is 0.4 percent.
    torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.004)


@pytest.mark.parametrize("sublayers", [1, 3])
def test_the_first_expert_starts_the_same_whatever_their_number(sublayers: int) -> None:
    layers = []
    for num_experts in (1, 8):
        experts = Experts(num_experts=num_experts, width=16, hidden_width=24, sublayers=sublayers)
        torch.manual_seed(3)
        experts.reset_parameters()
        layers.append(experts)
    for one, eight in zip(layers[0].w1, layers[1].w1, strict=True):
        assert torch.equal(one[0], eight[0])
        assert not torch.equal(eight[0], eight[1])


@pytest.mark.parametrize("sublayers", [1, 3])
def test_a_share_of_the_experts_is_drawn_as_it_is_among_all(sublayers: int) -> None:
    sizes = {"num_experts": 8, "width": 16, "hidden_width": 24, "sublayers": sublayers}
    whole = Experts(**sizes)
    torch.manual_seed(3)
    whole.reset_parameters()
    for held in (range(2), range(2, 6), range(6, 8)):
        part = Experts(**sizes, held=held)
        torch.manual_seed(3)
        part.reset_parameters()
        for all_of_them, some in zip(whole.parameters(), part.parameters(), strict=True):
            assert torch.equal(some, all_of_them[held.start : held.stop])


def test_w1_keeps_the_variance_and_w2_starts_at_zero() -> None:
    experts = Experts(num_experts=4, width=64, hidden_width=256, sublayers=2)
    torch.manual_seed(0)
    experts.reset_parameters()
    for w1, w2 in zip(experts.w1, experts.w2, strict=True):
        # Std 1 / sqrt(64); its own error over 65,536 draws is 0.3 percent.
        assert w1.std().item() == pytest.approx(0.125, rel=0.015)
        assert not bool(w2.any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sublayers": 0}, "sublayers=0: an expert needs at least 1"),
        ({"hidden_width": 0}, "hidden_width=0: an expert needs at least 1"),
        ({"hidden_width": 20}, "hidden_width=20 of an expert: a multiple of 8 is needed"),
        ({"width": 12}, "width=12 of an expert: a multiple of 8 is needed"),
    ],
)
def test_sizes_that_cannot_be_computed_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experts(**{"num_experts": 2, "width": 16, "hidden_width": 24, **options})
