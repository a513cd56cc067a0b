"""Expert choice: experts take their best tokens, an even share each."""

import numpy as np
import pytest
import scipy.special
import torch
from router_arms import build_router, decisions, groups_of, random_tokens

from lightning_base.moe import Experts, SparseLayer
from lightning_base.moe.layer import set_evaluation_mode
from lightning_base.routing import ExpertChoice


def expert_choice(**options: object) -> ExpertChoice:
    router = build_router("expert_choice", **options)
    assert isinstance(router, ExpertChoice)
    return router


def of_two(**options: object) -> ExpertChoice:
    """Two experts; the logits are the two coordinates of a token."""
    router = expert_choice(width=2, num_experts=2, **options)
    router.gate.weight.data = torch.eye(2)
    return router


def tokens_preferring_0_by(*odds: float) -> torch.Tensor:
    """Tokens with S[0] = odds / (1 + odds)."""
    return torch.tensor([[float(np.log(o)), 0.0] for o in odds])


# S for expert 0: 9/10, 3/4, 1/2, 1/3.
FOUR = tokens_preferring_0_by(9, 3, 1, 1 / 2)
NO_IDS = torch.zeros(8, dtype=torch.int64)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_each_expert_takes_its_share_of_best_tokens_with_their_scores(training: bool) -> None:
    # k = 1: 4 * 1 / 2 = 2 tokens each. Expert 0 takes tokens 0 and 1, expert 1 tokens 3 and 2.
    plan = of_two(top_k=1).train(training)(FOUR, NO_IDS[:4], groups_of(4))
    assert decisions(plan) == [[(0, 0.9)], [(0, 0.75)], [(1, 0.5)], [(1, 0.66667)]]
    assert plan.load.tolist() == plan.demand.tolist() == [2, 2]


def test_a_token_may_get_no_expert_or_all() -> None:
    # Logits over three experts; two experts like token 0 best, and so does the third. 3 * 1 / 3 = 1 token each.
    router = expert_choice(width=3, num_experts=3, top_k=1)
    router.gate.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    # Softmaxes (0.4, 0.4, 0.2), (0.1, 0.1, 0.8), (0.3, 0.3, 0.4): experts 0 and 1 take token 0, expert 2 takes token 1.
    tokens = torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]).log()
    plan = router(tokens, NO_IDS[:3], groups_of(3))
    assert decisions(plan) == [[(0, 0.4), (1, 0.4)], [(2, 0.8)], []]
    assert plan.tokens_left_behind.item() == 1


def test_a_share_that_is_not_whole_is_rounded_and_adds_up() -> None:
    # 3 tokens * 1 / 2: expert 0 takes 2, expert 1 takes 1.
    plan = of_two(top_k=1)(FOUR[:3], NO_IDS[:3], groups_of(3))
    assert decisions(plan) == [[(0, 0.9)], [(0, 0.75)], [(1, 0.5)]]
    # In groups of 5, 11 and 1 tokens, k = 2 and E = 8: 10 = 2 + 2 + 6 * 1, 22 = 6 * 3 + 2 * 2, 2 = 1 + 1.
    plan = expert_choice()(*random_tokens(17), groups_of(5, 11, 1))
    assert plan.group_demand.tolist() == [[2, 2, 1, 1, 1, 1, 1, 1], [3, 3, 3, 3, 3, 3, 2, 2], [1, 1, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_it_takes_the_tokens_that_numpy_ranks_first(k: int) -> None:
    router, sizes = expert_choice(top_k=k), (24, 40)
    tokens, ids = random_tokens(64)
    plan = router(tokens, ids, groups_of(*sizes))
    scores = scipy.special.softmax(tokens.double().numpy() @ router.gate.weight.detach().double().numpy().T, axis=1)
    expected = {
        (start + int(t), e): scores[start + t, e]
        for start, size in ((0, 24), (24, 40))
        for e in range(8)
        for t in np.argsort(-scores[start : start + size, e])[: size * k // 8]
    }
    pairs = zip(plan.token_index.tolist(), plan.expert_index.tolist(), strict=True)
    found = dict(zip(pairs, plan.weight.tolist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-4)


def test_evaluation_can_let_tokens_choose() -> None:
    layer = SparseLayer(of_two(top_k=1), Experts(num_experts=2, width=8, hidden_width=8), routing_group=1).eval()
    set_evaluation_mode(layer, "greedy")
    # S > 1/2 for expert 0: tokens 0 and 1, and token 3 is expert 1's. Token 2 is undecided: left out.
    plan = layer.router(FOUR[[0, 1, 3]], NO_IDS[:3], groups_of(3))
    assert decisions(plan) == [[(0, 0.9)], [(0, 0.75)], [(1, 0.66667)]]
    set_evaluation_mode(layer, None)
    # Experts again: of three tokens, expert 0 takes two and expert 1 one.
    assert layer.router(FOUR[:3], NO_IDS[:3], groups_of(3)).load.tolist() == [2, 1]


def test_choice_by_tokens_is_causal_and_choice_by_experts_is_not() -> None:
    tokens, ids = random_tokens(32)
    changed = torch.cat([tokens[:20], -tokens[20:]])
    router = expert_choice().eval()
    for mode, same in (("greedy", True), ("expert_choice", False)):
        router.evaluation_mode = mode
        before, after = (decisions(router(x, ids, groups_of(32)))[:20] for x in (tokens, changed))
        assert (before == after) == same, mode


def test_defaults_are_a_capacity_factor_of_two_and_the_paper_has_no_auxiliary_loss() -> None:
    router = expert_choice()
    assert router.top_k == 2
    assert router.loss_coefficients == {}
    assert list(router.evaluation_modes.items()) == [("expert_choice", False), ("greedy", True)]
    assert (router.causal, router.causal_in_evaluation) == (False, False)
