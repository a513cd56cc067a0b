"""Quantile balancing: the prices of one step's assignment, one quantile per expert, route the next step.

T tokens, E experts, k experts per token.
"""

import itertools

import numpy as np
import pytest
import torch
from balanced_program import balanced_optimum, dual_value
from router_arms import build_router, groups_of, random_tokens

from lightning_base.instantiation import ConfigError
from lightning_base.routing import Quantile
from lightning_base.routing.quantile import quantile_prices


def quantile(**options: object) -> Quantile:
    router = build_router("quantile", **options)
    assert isinstance(router, Quantile)
    return router


def lopsided_scores(num_tokens: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator) + torch.randn(num_experts, generator=generator)
    return logits.sigmoid()


def test_prices_of_two_experts_by_hand() -> None:
    # Four tokens, two each. With k = 1 the threshold of a token is its second largest score: 0 for all four. Expert 0
    # offers 3, 2, 1, 0 above it, of which two may be above its price: the third largest, 1. Expert 1 offers 0, 0, 0, 5,
    # whose third largest is 0. Less their mean: 0.5 and -0.5, at which tokens 0 and 1 prefer expert 0, token 3 prefers
    # expert 1, and token 2 is indifferent.
    scores = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    assert quantile_prices(scores, torch.zeros(2), 1, 1).tolist() == [0.5, -0.5]
    # They are balanced: another round changes nothing, from wherever it starts.
    assert quantile_prices(scores, torch.tensor([0.5, -0.5]), 1, 1).tolist() == [0.5, -0.5]
    assert quantile_prices(scores + 7, torch.tensor([7.5, 6.5]), 1, 5).tolist() == [0.5, -0.5]


def test_a_share_that_is_not_whole_is_rounded_down() -> None:
    # Three tokens and two experts, so 1.5 each: one above the price. Thresholds 0, 0, 0; expert 0 offers 3, 2, 0, whose
    # second largest is 2, expert 1 offers 0, 0, 5, whose second largest is 0.
    scores = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 5.0]])
    assert quantile_prices(scores, torch.zeros(2), 1, 1).tolist() == [1.0, -1.0]


def test_prices_are_those_of_a_plain_loop() -> None:
    scores = lopsided_scores(30, 5)
    for k in (1, 2, 4):
        prices = [0.0] * 5
        for _ in range(3):
            rows = [[s - p for s, p in zip(row, prices, strict=True)] for row in scores.double().tolist()]
            thresholds = [sorted(row, reverse=True)[k] for row in rows]
            offers = [
                [row[e] - t for row, t in zip(scores.double().tolist(), thresholds, strict=True)] for e in range(5)
            ]
            prices = [sorted(offer, reverse=True)[30 * k // 5] for offer in offers]
        expected = [p - sum(prices) / 5 for p in prices]
        assert quantile_prices(scores, torch.zeros(5), k, 3).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_rounds_descend_on_the_dual_towards_the_optimum(k: int) -> None:
    scores = lopsided_scores(48, 6, seed=k).numpy()
    optimum = balanced_optimum(scores, k)
    values = [dual_value(scores, np.zeros(6), k)]
    for rounds in (1, 2, 4, 8, 16, 64):
        prices = quantile_prices(torch.from_numpy(scores), torch.zeros(6), k, rounds).numpy()
        values.append(dual_value(scores, prices, k))
    assert all(value >= optimum - 1e-4 for value in values)
    assert all(after <= before + 1e-4 for before, after in itertools.pairwise(values))
    # Coordinate descent stops at a corner of the dual now and then, near the optimum.
    assert values[-1] - optimum < 0.01 * (values[0] - optimum)


@pytest.mark.parametrize("num_experts", [2, 8])
def test_carried_prices_balance_the_next_step_on_similar_tokens(num_experts: int) -> None:
    router = quantile(num_experts=num_experts, top_k=1)
    tokens, ids = random_tokens(2048)
    lean = 2 * router.gate.weight[0].detach() / router.gate.weight[0].detach().norm()
    tokens = 0.5 * tokens + lean
    first, second = groups_of(256, 256, 256, 256), tokens.split(1024)
    before = int(router(second[0], ids[:1024], first).demand.max())
    for _ in range(8):
        router.end_step(router.step_sums(router(second[0], ids[:1024], first)))
    after = int(router.eval()(second[1], ids[1024:], first).demand.max())
    mean = 1024 // num_experts
    assert before > 1.4 * mean
    assert after < 1.25 * mean


def test_the_prices_of_a_step_are_the_mean_over_its_groups() -> None:
    router = quantile(iterations=2)
    router.prices.copy_(torch.linspace(-0.1, 0.1, 8))
    tokens, ids = random_tokens(88)
    scores = (tokens @ router.gate.weight.T).sigmoid().detach()
    expected = sum(quantile_prices(part, router.prices, 2, 2) for part in scores.split([40, 48])) / 2
    whole = router.step_sums(router(tokens, ids, groups_of(40, 0, 48)))
    parts = [
        router.step_sums(router(part, part_ids, groups_of(len(part))))
        for part, part_ids in zip(tokens.split([40, 48]), ids.split([40, 48]), strict=True)
    ]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=0, atol=1e-6)
    router.end_step(whole)
    torch.testing.assert_close(router.prices, expected, rtol=0, atol=1e-6)


def test_a_step_without_tokens_leaves_the_prices() -> None:
    router = quantile()
    router.prices.copy_(torch.linspace(-1, 1, 8))
    before = router.prices.clone()
    tokens, ids = random_tokens(0)
    router.end_step(router.step_sums(router(tokens, ids, groups_of(0, 0))))
    router.end_step({})
    assert torch.equal(router.prices, before)


def test_prices_are_in_the_checkpoint_and_a_forward_pass_leaves_them() -> None:
    router = quantile()
    router.prices.copy_(torch.linspace(-1, 1, 8))
    before = router.state_dict()["prices"].clone()
    router(*random_tokens(64), groups_of(64))
    assert torch.equal(router.state_dict()["prices"], before)


def test_scores_less_prices_choose_and_scores_weigh() -> None:
    router = Quantile(num_experts=3, width=3, top_k=1)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(3))
    router.prices.copy_(torch.tensor([0.5, 0.0, -0.1]))
    # sigmoid of 1, 0, 0 = 0.731, 0.5, 0.5; less the prices 0.231, 0.5, 0.6.
    plan = router(torch.tensor([[1.0, 0.0, 0.0]]), torch.zeros(1, dtype=torch.int64), groups_of(1))
    assert plan.expert_index.tolist() == [2]
    assert plan.weight.tolist() == [0.5]


def test_every_token_to_every_expert_needs_no_prices() -> None:
    router = quantile(num_experts=4, top_k=4)
    plan = router(*random_tokens(16), groups_of(16))
    router.end_step(router.step_sums(plan))
    assert plan.demand.tolist() == [16] * 4
    assert router.prices.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 1.0}, r"router\.capacity_factor=1\.0 contradicts Quantile"),
        ({"bias_update_rate": 0.1}, r"router\.bias_update_rate=0\.1 contradicts Quantile: .* no rate"),
        ({"top_k": 1, "renormalize": True}, r"router\.renormalize=true with router\.top_k=1"),
        ({"iterations": 0}, r"router\.iterations=0: prices need at least 1 round"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantile(**options)
