"""BIP-based balancing: the group's own prices in training, carried ones in evaluation.

T tokens, E experts, k experts per token.
"""

import numpy as np
import pytest
import torch
from balanced_program import balanced_optimum, dual_value
from router_arms import build_router, groups_of, random_tokens

from lightning_base.assignment import balanced_assignment
from lightning_base.instantiation import ConfigError
from lightning_base.routing import BIP
from lightning_base.routing.bip import bip_prices


def bip(**options: object) -> BIP:
    router = build_router("bip", **options)
    assert isinstance(router, BIP)
    return router


def algorithm_1(scores: np.ndarray, start: np.ndarray, k: int, rounds: int) -> np.ndarray:
    """The paper's dual updates, with sorts: position k of a descending sort is the (k+1)-th largest.

    The price of an expert is the middle between the last token inside its share and the first outside.
    """
    prices = start.astype(float)
    for _ in range(rounds):
        token_price = np.maximum(0, np.sort(scores - prices, axis=1)[:, ::-1][:, k])
        offers = np.sort(scores - token_price[:, None], axis=0)[::-1]
        share = len(scores) * k // scores.shape[1]
        prices = np.maximum(0, (offers[max(share - 1, 0)] + offers[share]) / 2)
    return prices


def softmax_scores(num_tokens: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator) + torch.randn(num_experts, generator=generator)
    return logits.softmax(-1)


def test_prices_of_two_experts_by_hand() -> None:
    # k = 1 and two of four tokens each. A token's price is its second largest score, 0.2, 0.3, 0.4 and 0.1. Above it,
    # expert 0 offers 0.6, 0.4, 0.2 and 0, so its price lies between 0.4 and 0.2: 0.3. Expert 1 offers 0, 0, 0 and 0.8,
    # so its price is 0. At these prices tokens 0 and 1 prefer expert 0 (0.5 to 0.2, 0.4 to 0.3), 2 and 3 expert 1.
    scores = torch.tensor([[0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.1, 0.9]])
    assert bip_prices(scores, torch.zeros(2), 1, 1).tolist() == pytest.approx([0.3, 0.0])


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("rounds", [1, 4, 9])
@pytest.mark.parametrize("num_tokens", [1, 5, 36])
def test_prices_are_those_of_the_papers_algorithm(k: int, rounds: int, num_tokens: int) -> None:
    scores, start = softmax_scores(num_tokens, 6), torch.linspace(0, 0.3, 6)
    expected = algorithm_1(scores.double().numpy(), start.double().numpy(), k, rounds)
    assert bip_prices(scores, start, k, rounds).tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_many_rounds_approach_the_exact_assignment(k: int) -> None:
    scores = softmax_scores(64, 8, seed=k)
    optimum = balanced_optimum(scores.numpy(), k)
    # The exact solver agrees with scipy about what there is to approach.
    assert balanced_assignment(scores, k=k).objective == pytest.approx(optimum, rel=1e-6)
    greedy = scores.topk(k, dim=1).values.double().sum().item()
    loads, values = [], []
    for rounds in (0, 4, 200):
        prices = bip_prices(scores, torch.zeros(8), k, rounds)
        experts = (scores - prices).topk(k, dim=1).indices
        loads.append(torch.bincount(experts.flatten(), minlength=8).max().item())
        values.append(scores.gather(1, experts).double().sum().item())
    mean = 64 * k // 8
    assert loads[0] >= 2 * mean
    assert loads[1] < loads[0]
    assert loads[2] <= mean + 1
    # Balanced but for a token, it is worth what the best balanced assignment is, and its prices prove it.
    assert values[2] - optimum == pytest.approx(0, abs=0.03 * (greedy - optimum))  # one token
    proven = dual_value(scores.numpy(), bip_prices(scores, torch.zeros(8), k, 200).numpy(), k)
    assert 0 <= proven - optimum + 1e-5 < 0.001 * (greedy - optimum)


def test_training_balances_each_group_by_prices_of_its_own() -> None:
    router = bip(iterations=3)
    router.prices.copy_(torch.linspace(0, 0.02, 8))
    tokens, ids = random_tokens(88)
    plan = router(tokens, ids, groups_of(40, 48))
    scores = (tokens @ router.gate.weight.T).softmax(-1).detach()
    for g, (first, last) in enumerate(((0, 40), (40, 88))):
        group = scores[first:last].double().numpy()
        prices = algorithm_1(group, router.prices.double().numpy(), 2, 3)
        best = np.argsort(-(group - prices), axis=1)[:, :2]
        assert np.sort(plan.expert_index.view(-1, 2)[first:last].numpy(), 1).tolist() == np.sort(best, 1).tolist()
        assert plan.group_demand[g].tolist() == np.bincount(best.ravel(), minlength=8).tolist()
    # Weighed by the softmax alone.
    torch.testing.assert_close(plan.weight.detach(), scores[plan.token_index, plan.expert_index])


def test_evaluation_routes_by_the_carried_prices_and_leaves_them() -> None:
    router = bip(top_k=1).eval()
    tokens, ids = random_tokens(64)
    scores = (tokens @ router.gate.weight.T).softmax(-1).detach()
    assert router(tokens, ids, groups_of(64)).expert_index.tolist() == scores.argmax(1).tolist()
    router.prices[int(scores.argmax(1)[0])] = 2.0
    plan = router(tokens, ids, groups_of(64))
    assert plan.expert_index.tolist() == (scores - router.prices).argmax(1).tolist()
    assert router.prices.sum().item() == 2.0


def test_carried_prices_are_the_mean_over_the_groups_of_a_step() -> None:
    router = bip()
    tokens, ids = random_tokens(88)
    whole_plan = router(tokens, ids, groups_of(40, 0, 48))
    whole = router.step_sums(whole_plan)
    parts = [
        router.step_sums(router(part, part_ids, groups_of(len(part))))
        for part, part_ids in zip(tokens.split([40, 48]), ids.split([40, 48]), strict=True)
    ]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=0, atol=1e-6)
    router.end_step(whole)
    scores = (tokens @ router.gate.weight.T).softmax(-1).detach().double().numpy()
    expected = sum(algorithm_1(part, np.zeros(8), 2, 4) for part in (scores[:40], scores[40:])) / 2
    assert router.state_dict()["prices"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    router.end_step(router.step_sums(router(*random_tokens(0), groups_of(0))))
    router.end_step({})
    assert router.prices.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_first_step_is_nearly_balanced_where_greedy_is_not() -> None:
    router = bip(top_k=1)
    tokens, ids = random_tokens(512)
    tokens = tokens + 6 * router.gate.weight[0].detach() / router.gate.weight[0].detach().norm()
    balanced = router.train()(tokens, ids, groups_of(512)).demand.max().item()
    greedy = router.eval()(tokens, ids, groups_of(512)).demand.max().item()
    assert greedy > 2 * 64
    assert balanced < 1.5 * 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 1.0}, r"router\.capacity_factor=1\.0 contradicts BIP"),
        ({"bias_update_rate": 0.1}, r"router\.bias_update_rate=0\.1 contradicts BIP: .* no rate"),
        ({"top_k": 1, "renormalize": True}, r"router\.renormalize=true with router\.top_k=1"),
        ({"iterations": 0}, r"router\.iterations=0: prices need at least 1 round"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bip(**options)
