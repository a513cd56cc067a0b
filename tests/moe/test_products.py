"""Experts on a CPU against a loop over experts, whoever computes them: one thread, several, or all at one product.

A assignments sorted by expert, D width, E experts.
"""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_base.moe import Experts, products, workers
from lightning_base.moe.workers import for_each_expert

ACTIVATION = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
EQUAL, UNEQUAL, EMPTY, ALONE, COLLAPSED = [5, 5, 5], [7, 0, 3], [0, 0, 0], [6], [0, 9, 0]
every_load = pytest.mark.parametrize("counts", [EQUAL, UNEQUAL, EMPTY, ALONE, COLLAPSED], ids=str)


def make_experts(num_experts: int, *, width: int = 8, hidden_width: int = 16, **options: object) -> Experts:
    experts = Experts(num_experts=num_experts, width=width, hidden_width=hidden_width, **options)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def by_loop(experts: Experts, tokens_AD: Tensor, counts: list[int], activation: str = "relu") -> Tensor:
    """f_e(x) - x of each expert by itself, with torch's own gradient."""
    added = []
    for expert, part in enumerate(tokens_AD.split(counts)):
        hidden = part
        for w1, w2 in zip(experts.w1, experts.w2, strict=True):
            hidden = hidden + ACTIVATION[activation](F.layer_norm(hidden, hidden.shape[-1:]) @ w1[expert]) @ w2[expert]
        added.append(hidden - part)
    return torch.cat(added)


def check(experts: Experts, counts: list[int], activation: str = "relu", tolerance: float = 1e-10) -> None:
    """Values and all gradients are the loop's."""
    tokens_AD = torch.randn(sum(counts), experts.w1[0].shape[1], dtype=experts.w1[0].dtype, requires_grad=True)
    leaves = [tokens_AD, *experts.parameters()]
    got, expected = experts(tokens_AD, torch.tensor(counts)), by_loop(experts, tokens_AD, counts, activation)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    upstream = torch.randn_like(got)
    ours = torch.autograd.grad((got * upstream).sum(), leaves)
    theirs = torch.autograd.grad((expected * upstream).sum(), leaves)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("activation", ACTIVATION)
@pytest.mark.parametrize("sublayers", [1, 3])
@every_load
def test_values_and_gradients_are_those_of_a_loop_over_experts(
    counts: list[int], sublayers: int, activation: str
) -> None:
    # grouped_mm, which other activations use for unequal counts, knows no double precision.
    dtype, tolerance = (torch.float64, 1e-10) if activation == "relu" else (torch.float32, 1e-4)
    experts = make_experts(len(counts), sublayers=sublayers, activation=activation).to(dtype)
    check(experts, counts, activation, tolerance)


@every_load
def test_gradients_are_the_slope_of_the_values(counts: list[int]) -> None:
    experts = make_experts(len(counts)).double()
    tokens_AD = torch.randn(sum(counts), 8, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in experts.named_parameters()]

    def added(tokens: Tensor, *parameters: Tensor) -> Tensor:
        given = (tokens, torch.tensor(counts))
        return torch.func.functional_call(experts, dict(zip(names, parameters, strict=True)), given)

    # Along random directions, each of which has a part of every number.
    assert torch.autograd.gradcheck(added, (tokens_AD, *experts.parameters()), fast_mode=True)


@pytest.fixture
def small_work_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are woken for anything, and experts with more than 5 rows of 8 x 16 get all of them."""
    monkeypatch.setattr(workers, "SMALL", 0)
    monkeypatch.setattr(workers, "LARGE", 2 * 8 * 16 * 5 + 1)


@pytest.mark.usefixtures("small_work_is_shared")
@pytest.mark.parametrize("threads", [1, 2, 5])
@given(counts=st.lists(st.integers(0, 8), min_size=1, max_size=9))
def test_no_number_of_threads_changes_what_an_expert_computes(threads: int, counts: list[int]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(make_experts(len(counts)).double(), counts)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("small_work_is_shared")
def test_the_same_numbers_come_out_each_time() -> None:
    counts = [4, 0, 5, 8, 1, 2]
    experts, tokens_AD = make_experts(6), torch.randn(20, 8, requires_grad=True)

    def once() -> list[Tensor]:
        added = experts(tokens_AD, torch.tensor(counts))
        return [added.detach(), *torch.autograd.grad(added.square().sum(), [tokens_AD, *experts.parameters()])]

    first = once()
    for _ in range(20):
        assert all(torch.equal(one, other) for one, other in zip(once(), first, strict=True))


@pytest.mark.usefixtures("small_work_is_shared")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradient_computes_the_same(mode: type) -> None:
    counts = torch.tensor([4, 1, 5])
    experts, tokens_AD = make_experts(3), torch.randn(10, 8)
    expected = experts(tokens_AD, counts)
    with mode():
        got = experts(tokens_AD, counts)
    assert not got.requires_grad
    assert torch.equal(got, expected)


@pytest.mark.parametrize("experts_at_once", [1, 2, 3, 5])
def test_the_backward_pass_takes_as_many_experts_at_once_as_fit(
    experts_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "AT_ONCE", experts_at_once * 4 * 16 * 8)  # 4 rows of 16 numbers of 8 bytes
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    check(make_experts(5).double(), [4] * 5)


def test_gradients_of_two_passes_add_up() -> None:
    experts, tokens_AD, counts = make_experts(2), torch.randn(9, 8), torch.tensor([4, 5])
    experts(tokens_AD, counts).sum().backward()
    once = [parameter.grad.clone() for parameter in experts.parameters()]
    experts(tokens_AD, counts).sum().backward()
    for parameter, gradient in zip(experts.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_frozen_tokens_or_weights_get_no_gradient_and_the_others_do() -> None:
    experts, counts = make_experts(2), torch.tensor([4, 5])
    experts(torch.randn(9, 8), counts).sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in experts.parameters())
    experts.requires_grad_(False)
    tokens_AD = torch.randn(9, 8, requires_grad=True)
    experts(tokens_AD, counts).sum().backward()
    assert bool(tokens_AD.grad.any())


@pytest.mark.parametrize("counts", [[5, 5], [3, 7], [10, 0]], ids=str)
def test_a_model_in_half_precision_computes_the_same_within_its_digits(counts: list[int]) -> None:
    experts = make_experts(2, width=16).bfloat16()
    tokens_AD = torch.randn(10, 16).bfloat16()
    got = experts(tokens_AD, torch.tensor(counts))
    expected = by_loop(experts.float(), tokens_AD.float(), counts)
    assert got.dtype == torch.bfloat16
    # Sums of 16 products, each rounded to 8 bits.
    torch.testing.assert_close(got.float(), expected, atol=0.08, rtol=0.04)


def test_normalized_tokens_are_not_normalized_again() -> None:
    experts, tokens_AD, counts = make_experts(2), torch.randn(9, 8), torch.tensor([4, 5])
    normed_AD = F.layer_norm(tokens_AD, (8,))
    assert torch.equal(experts(normed_AD, counts, normalized=True), experts(tokens_AD, counts))


@pytest.mark.usefixtures("small_work_is_shared")
def test_every_expert_is_visited_once_with_its_rows() -> None:
    seen: list[tuple[int, int, int]] = []
    for_each_expert(lambda expert, rows: seen.append((expert, rows.start, rows.stop)), [3, 0, 900, 2], 256)
    assert sorted(seen) == [(0, 0, 3), (1, 3, 3), (2, 3, 903), (3, 903, 905)]


@pytest.mark.usefixtures("small_work_is_shared")
def test_what_goes_wrong_in_a_thread_is_raised_by_the_one_that_asked() -> None:
    def fail(expert: int, rows: slice) -> None:
        raise RuntimeError(f"expert {expert} failed")

    with pytest.raises(RuntimeError, match=r"expert [01] failed"):
        for_each_expert(fail, [2, 3], 256)


@pytest.mark.usefixtures("small_work_is_shared")
def test_threads_of_experts_are_single_and_leave_the_number_of_all_others_alone() -> None:
    before, inside, after = torch.get_num_threads(), [], []
    torch.set_num_threads(3)
    try:
        for_each_expert(lambda expert, rows: inside.append(torch.get_num_threads()), [1, 1, 1, 1], 256)
        other = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert (torch.get_num_threads(), inside, after) == (3, [1, 1, 1, 1], [3])
    finally:
        torch.set_num_threads(before)
