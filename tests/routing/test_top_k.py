"""Top-k: the softmax and the sigmoid gate, and the losses that come with them."""

import math

import pytest
import torch
from router_arms import build_router, decisions, groups_of, random_tokens

from lightning_base.routing import TopK

LN3 = math.log(3)


def top_k_of_three(**options: object) -> TopK:
    """A router whose logits are the three coordinates of a token."""
    router = build_router("top_k", width=3, num_experts=3, **options)
    assert isinstance(router, TopK)
    router.gate.weight.data = torch.eye(3)
    return router


def ids(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


# Sigmoids 3/4, 1/2 and 1/4.
ONE_TOKEN = torch.tensor([[LN3, 0.0, -LN3]])


def test_sigmoid_gates_of_the_chosen_sum_to_one() -> None:
    # (3/4) / (5/4) and (1/2) / (5/4).
    plan = top_k_of_three(gate="sigmoid")(ONE_TOKEN, ids(1), groups_of(1))
    assert decisions(plan) == [[(0, 0.6), (1, 0.4)]]


def test_sigmoid_gates_are_scores_as_they_are_if_not_renormalized() -> None:
    plan = top_k_of_three(gate="sigmoid", renormalize=False)(ONE_TOKEN, ids(1), groups_of(1))
    assert decisions(plan) == [[(0, 0.75), (1, 0.5)]]


def test_balancing_takes_sigmoid_scores_over_their_sum_for_probabilities() -> None:
    # P = (3/4, 1/2, 1/4) / (3/2) = (1/2, 1/3, 1/6), f = (1/2, 1/2, 0): 3 (1/4 + 1/6) = 5/4.
    plan = top_k_of_three(gate="sigmoid")(ONE_TOKEN, ids(1), groups_of(1))
    assert plan.losses["load_balancing_loss"].item() == pytest.approx(5 / 4)
    torch.testing.assert_close(plan.aux["probabilities"], torch.tensor([[1 / 2, 1 / 3, 1 / 6]]))


def test_experts_whose_sigmoids_are_all_one_are_still_told_apart() -> None:
    # In float32 the sigmoid of 20 is 1 exactly, as that of 30 is.
    plan = top_k_of_three(gate="sigmoid")(torch.tensor([[20.0, 30.0, 25.0]]), ids(1), groups_of(1))
    assert plan.expert_index.tolist() == [1, 2]


def test_sigmoids_that_underflow_leave_finite_gates_and_gradients() -> None:
    router = top_k_of_three(gate="sigmoid")
    plan = router(torch.full((1, 3), -200.0), ids(1), groups_of(1))
    (plan.weight.sum() + plan.losses["load_balancing_loss"]).backward()
    assert torch.isfinite(plan.weight).all()
    assert router.gate.weight.grad is not None
    assert torch.isfinite(router.gate.weight.grad).all()


def test_z_loss_by_hand() -> None:
    # logsumexp(0, 0, 0) = ln 3, logsumexp(ln 3, ln 3, ln 3) = ln 9 = 2 ln 3: the mean of the squares is 5/2 (ln 3)^2.
    router = top_k_of_three(z_loss=True)
    plan = router(torch.tensor([[0.0, 0.0, 0.0], [LN3, LN3, LN3]]), ids(2), groups_of(2))
    assert plan.losses["router_z_loss"].item() == pytest.approx(2.5 * LN3**2, rel=1e-6)
    assert router.loss_coefficients == {"load_balancing_loss": 0.01, "router_z_loss": 0.001}


def test_the_z_loss_of_one_router_is_not_a_loss_of_another() -> None:
    top_k_of_three(z_loss=True)
    other = top_k_of_three()
    assert other.loss_coefficients == {"load_balancing_loss": 0.01}
    assert set(other(ONE_TOKEN, ids(1), groups_of(1)).losses) == {"load_balancing_loss"}


def test_defaults_are_two_experts_with_a_renormalized_softmax_and_no_drops() -> None:
    router = build_router("top_k")
    assert isinstance(router, TopK)
    chosen = (router.top_k, router.gate_function, router.renormalize, router.capacity_factor, router.z_loss)
    assert chosen == (2, "softmax", True, None, False)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_scope_of_balance_is_a_group_a_sequence_or_a_step(gate: str) -> None:
    tokens, token_ids = random_tokens(40)
    group, sequence, step = (
        build_router("top_k", gate=gate, balance_scope=scope)(tokens, token_ids, groups_of(40))
        for scope in ("group", "sequence", "step")
    )
    # One group of one sequence: the same thing. Over a step the plan holds what the loss is to be built from.
    assert group.losses["load_balancing_loss"].item() == sequence.losses["load_balancing_loss"].item()
    assert step.losses == {}
    part = step.step_losses["load_balancing_loss"]
    assert part.demand.tolist() == step.demand.tolist()
    assert part.probability_sum.sum().item() == pytest.approx(40, rel=1e-5)
