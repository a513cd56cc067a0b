"""Rows of tokens to assignments and back against loops over tokens.

A assignments sorted by expert, T tokens, D width.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_base.moe import Dispatcher
from lightning_base.routing import RoutingPlan
from lightning_base.routing.plan import RoutingGroups, count_by_group

TOKENS, EXPERTS, WIDTH = 6, 3, 4
some_pairs = st.lists(st.tuples(st.integers(0, TOKENS - 1), st.integers(0, EXPERTS - 1)), max_size=14, unique=True)


def plan_of(pairs: list[tuple[int, int]], weight: Tensor) -> RoutingPlan:
    """Tokens that are left behind, that have one expert, and that have several."""
    token_index = torch.tensor([token for token, _ in pairs], dtype=torch.int64)
    expert_index = torch.tensor([expert for _, expert in pairs], dtype=torch.int64)
    groups = RoutingGroups((TOKENS,))
    demand = count_by_group(groups, EXPERTS, token_index, expert_index)
    return RoutingPlan(token_index, expert_index, weight, demand, groups)


@given(pairs=some_pairs, seed=st.integers(0, 100))
def test_tokens_go_out_by_expert_and_come_back_weighted(pairs: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(len(pairs), generator=generator)
    tokens_TD = torch.randn(TOKENS, WIDTH, generator=generator)
    dispatcher = Dispatcher(plan_of(pairs, weight))
    sent_AD = dispatcher.dispatch(tokens_TD)
    by_expert = sorted(range(len(pairs)), key=lambda a: pairs[a][1])
    assert sent_AD.tolist() == [tokens_TD[pairs[a][0]].tolist() for a in by_expert]

    expected_TD = torch.zeros(TOKENS, WIDTH)
    scale_A = 1 + torch.arange(len(pairs))
    for row, a in enumerate(by_expert):
        expected_TD[pairs[a][0]] += weight[a] * scale_A[row] * tokens_TD[pairs[a][0]]
    torch.testing.assert_close(dispatcher.combine(sent_AD * scale_A[:, None]), expected_TD)


@pytest.mark.parametrize(
    "pairs",
    [
        [(t, t % EXPERTS) for t in range(TOKENS)],  # each token once
        [(4, 0), (0, 2), (1, 2)],  # some left behind
        [(t, e) for e in range(EXPERTS) for t in (5, 3, 0)],  # some of them three times, choice by choice
        [],
    ],
    ids=["once", "left-behind", "several", "none"],
)
def test_gradients_are_the_slope_of_the_values(pairs: list[tuple[int, int]]) -> None:
    weight = torch.rand(len(pairs), dtype=torch.float64, requires_grad=True)
    tokens_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)

    def there_and_back(tokens: Tensor, weight: Tensor) -> Tensor:
        dispatcher = Dispatcher(plan_of(pairs, weight))
        return dispatcher.combine(dispatcher.dispatch(tokens).square())

    assert torch.autograd.gradcheck(there_and_back, (tokens_TD, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_keep_their_precision(dtype: torch.dtype) -> None:
    weight = torch.rand(TOKENS, requires_grad=True)
    dispatcher = Dispatcher(plan_of([(t, 0) for t in range(TOKENS)], weight))
    tokens_TD = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    got = dispatcher.combine(dispatcher.dispatch(tokens_TD))
    got.sum().backward()
    assert (got.dtype, tokens_TD.grad.dtype, weight.grad.dtype) == (dtype, dtype, torch.float32)
    torch.testing.assert_close(got, tokens_TD * weight[:, None].to(dtype))
