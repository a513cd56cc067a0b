"""Inputs on which the solver released with the paper hangs, crashes or returns no assignment; none may hang."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_base.assignment import balanced_assignment
from tests.assignment.cases import assert_balanced

SOLVERS = ["transport", "auction", "sinkhorn"]
pytestmark = pytest.mark.timeout(120)  # cuts off a hang; a machine that is busy or compiles needs no more


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tokens", [1025, 1031, 9])
def test_tokens_that_do_not_divide_by_experts(solver: str, tokens: int) -> None:
    ours = balanced_assignment(normal(tokens, 8), solver=solver)
    assert_balanced(ours.expert, 8)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_fewer_tokens_than_experts(solver: str, tokens: int) -> None:
    ours = balanced_assignment(normal(tokens, 16), solver=solver)
    assert ours.expert.shape == (tokens,)
    assert_balanced(ours.expert, 16)


@pytest.mark.parametrize("solver", SOLVERS)
def test_nan_is_an_error_that_names_the_row(solver: str) -> None:
    scores = normal(64, 8)
    scores[37, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN in row 37"):
        balanced_assignment(scores, solver=solver)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_expert_takes_every_token(solver: str) -> None:
    ours = balanced_assignment(normal(100, 1), solver=solver)
    assert ours.expert.tolist() == [0] * 100


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_tokens_equal(solver: str) -> None:
    # Every token has the scores 3, 2, 1, 0, so any balanced assignment earns 256 * (3 + 2 + 1 + 0).
    ours = balanced_assignment(torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(1024, 1), solver=solver)
    assert_balanced(ours.expert, 4)
    assert ours.objective == 256 * 6


@pytest.mark.parametrize("solver", SOLVERS)
def test_constant_scores(solver: str) -> None:
    ours = balanced_assignment(torch.full((512, 16), 0.25), solver=solver)
    assert_balanced(ours.expert, 16)
    assert ours.objective == 128.0


@pytest.mark.parametrize("solver", SOLVERS)
def test_three_level_integer_scores(solver: str) -> None:
    rng = np.random.default_rng(0)
    ours = balanced_assignment(torch.from_numpy(rng.integers(0, 3, (2048, 16)).astype(np.float32)), solver=solver)
    assert_balanced(ours.expert, 16)
    if solver == "transport":  # with 16 random levels per token, a balanced assignment with only twos exists
        assert ours.objective >= 2 * 2048 - 2 * 2048 * (2 / 3) ** 16 * 4


@pytest.mark.parametrize("solver", SOLVERS)
def test_clipped_scores(solver: str) -> None:
    ours = balanced_assignment(normal(1024, 8).clamp(max=0.5), solver=solver)
    assert_balanced(ours.expert, 8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_repeated_tokens(solver: str) -> None:
    ours = balanced_assignment(normal(16, 8).repeat_interleave(64, dim=0), solver=solver)
    assert_balanced(ours.expert, 8)


def test_three_level_scores_at_training_size_are_exact() -> None:
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(-1, 2, (4096, 32)).astype(np.float32))
    ours = balanced_assignment(scores, certificate=True)
    assert_balanced(ours.expert, 32)
    assert ours.gap == 0.0  # sums of integers: exact


def test_clustered_and_repeated_tokens_lose_nothing() -> None:
    scores = normal(40, 32)[torch.multinomial(1 / torch.arange(1.0, 41), 2048, replacement=True)]
    ours = balanced_assignment(scores, certificate=True)
    assert abs(ours.gap or 0.0) <= 1e-9 * abs(ours.objective)
