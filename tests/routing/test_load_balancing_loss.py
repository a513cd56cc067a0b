"""E sum_i f_i P_i. T tokens, E experts, k experts per token."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from router_arms import build_router, groups_of, random_tokens

from lightning_base.routing import RoutingGroups
from lightning_base.routing.losses import finish_step_loss, load_balancing_loss, router_z_loss


def loss_of(probabilities: torch.Tensor, demand: list[list[int]], *sizes: int) -> torch.Tensor:
    return load_balancing_loss(probabilities, torch.tensor(demand), groups_of(*sizes))


@pytest.mark.parametrize("k", [1, 2])
def test_it_is_one_under_uniform_routing_whatever_k(k: int) -> None:
    assert loss_of(torch.full((12, 4), 0.25), [[3 * k] * 4], 12).item() == pytest.approx(1.0)


def test_it_is_the_number_of_experts_when_collapsed() -> None:
    certain = torch.zeros(12, 4)
    certain[:, 0] = 1.0
    assert loss_of(certain, [[12, 0, 0, 0]], 12).item() == pytest.approx(4.0)


def test_two_experts_by_hand() -> None:
    # Three tokens at (0.9, 0.1), (0.6, 0.4), (0.2, 0.8): f = (2/3, 1/3), P = (17/30, 13/30).
    # 2 (2/3 * 17/30 + 1/3 * 13/30) = 2 * 47/90 = 47/45.
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    assert loss_of(probabilities, [[2, 1]], 3).item() == pytest.approx(47 / 45)


def test_the_gradient_flows_through_the_probabilities_alone() -> None:
    # d/dp[t, i] of E sum_i f_i (sum_t p[t, i] / T) = E f_i / T: with f = (2/3, 1/3), E = 2, T = 3 that is 4/9, 2/9.
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], requires_grad=True)
    loss_of(probabilities, [[2, 1]], 3).backward()
    assert probabilities.grad is not None
    torch.testing.assert_close(probabilities.grad, torch.tensor([[4 / 9, 2 / 9]] * 3))


@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_it_is_the_mean_over_groups_that_hold_tokens(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(3), size=sum(sizes)).astype(np.float32)
    chosen = probabilities.argmax(1) if len(probabilities) else np.zeros(0, int)
    losses, demand, start = [], [], 0
    for size in sizes:
        counts = [int((chosen[start : start + size] == e).sum()) for e in range(3)]
        demand.append(counts)
        if size:
            means = [float(np.mean(probabilities[start : start + size, e])) for e in range(3)]
            losses.append(3 * sum(counts[e] / size * means[e] for e in range(3)))
        start += size
    expected = sum(losses) / max(len(losses), 1)
    assert loss_of(torch.from_numpy(probabilities), demand, *sizes).item() == pytest.approx(expected, rel=1e-5)


def test_micro_batches_of_whole_groups_average_to_the_loss_of_all() -> None:
    router = build_router("switch")
    tokens, ids = random_tokens(80)
    whole = router(tokens, ids, groups_of(20, 20, 20, 20)).losses["load_balancing_loss"]
    parts = [
        router(part, part_ids, groups_of(20, 20)).losses["load_balancing_loss"]
        for part, part_ids in zip(tokens.split(40), ids.split(40), strict=True)
    ]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts) / 2, rel=1e-6)
    gradient = torch.autograd.grad(whole, list(router.parameters()))
    gradient_of_parts = torch.autograd.grad(sum(parts) / 2, list(router.parameters()))
    torch.testing.assert_close(gradient, gradient_of_parts)


def missing_division_by_k(probabilities: torch.Tensor, demand: torch.Tensor, groups: RoutingGroups) -> torch.Tensor:
    share = demand.sum(0) / groups.num_tokens
    return demand.shape[1] * (share * probabilities.mean(0)).sum()


def built_from_counts(probabilities: torch.Tensor, demand: torch.Tensor, groups: RoutingGroups) -> torch.Tensor:
    share = demand.sum(0) / demand.sum()
    counted = torch.bincount(probabilities.argmax(1), minlength=demand.shape[1]) / len(probabilities)
    return demand.shape[1] * (share * counted).sum() + 0 * probabilities.sum()


def test_the_known_answers_tell_published_mistakes_apart() -> None:
    uniform, demand, groups = torch.full((12, 4), 0.25), torch.tensor([[6] * 4]), groups_of(12)
    assert load_balancing_loss(uniform, demand, groups).item() == pytest.approx(1.0)
    assert missing_division_by_k(uniform, demand, groups).item() == pytest.approx(2.0)

    probabilities, demand, groups = torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([[2, 0]]), groups_of(2)
    for loss, learns in ((load_balancing_loss, True), (built_from_counts, False)):
        leaf = probabilities.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, demand, groups), leaf)
        assert bool(gradient.abs().sum() > 0) == learns


def test_over_a_step_it_is_the_loss_of_all_tokens_at_once_however_the_step_is_cut() -> None:
    router = build_router("switch", balance_scope="step", capacity_factor=None)
    tokens, ids = random_tokens(80)
    # Independent of the code under test: all tokens as one group.
    one_group = build_router("switch", capacity_factor=None)
    expected = one_group(tokens, ids, groups_of(80)).losses["load_balancing_loss"]
    expected_gradient = torch.autograd.grad(expected, list(one_group.parameters()))
    for cuts in ([80], [40, 40], [20, 12, 48]):
        parts = [
            router(part, part_ids, groups_of(len(part))).step_losses["load_balancing_loss"]
            for part, part_ids in zip(tokens.split(cuts), ids.split(cuts), strict=True)
        ]
        demand = sum(part.demand for part in parts)
        total = sum(finish_step_loss(part, demand, 80) for part in parts)
        assert total.item() == pytest.approx(expected.item(), rel=1e-5)
        gradient = torch.autograd.grad(total, list(router.parameters()))
        torch.testing.assert_close(gradient, expected_gradient)


def test_counts_of_one_part_alone_would_be_another_loss() -> None:
    # The mistake that the step scope has to avoid: f from a part's own counts.
    router = build_router("switch", balance_scope="step", capacity_factor=None)
    tokens, ids = random_tokens(80)
    parts = [
        router(part, part_ids, groups_of(len(part))).step_losses["load_balancing_loss"]
        for part, part_ids in zip(tokens.split(8), ids.split(8), strict=True)
    ]
    demand = sum(part.demand for part in parts)
    right = sum(finish_step_loss(part, demand, 80) for part in parts)
    wrong = sum(finish_step_loss(part, part.demand, 80) for part in parts)
    assert abs(wrong.item() - right.item()) > 1e-2


def test_by_sequence_it_is_the_mean_over_sequences() -> None:
    router = build_router("switch", balance_scope="sequence", capacity_factor=None)
    tokens, ids = random_tokens(60)
    found = router(tokens, ids, RoutingGroups((60,), (20, 20, 20))).losses["load_balancing_loss"]
    alone = build_router("switch", capacity_factor=None)
    expected = alone(tokens, ids, groups_of(20, 20, 20)).losses["load_balancing_loss"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.item() != pytest.approx(alone(tokens, ids, groups_of(60)).losses["load_balancing_loss"].item())


def test_z_loss_by_hand() -> None:
    # logsumexp(0, 0) = ln 2; logsumexp(ln 3, 0) = ln 4. Two groups of one token: the mean of the squares.
    logits = torch.tensor([[0.0, 0.0], [np.log(3.0), 0.0]], dtype=torch.float32)
    expected = (np.log(2) ** 2 + np.log(4) ** 2) / 2
    assert router_z_loss(logits, groups_of(1, 1)).item() == pytest.approx(expected, rel=1e-6)
