"""S-BASE: the plan is Sinkhorn's fixed point; who goes where is its largest entries, which are not balanced.

T tokens, E experts.
"""

import numpy as np
import pytest
import torch
from router_arms import build_router, groups_of, random_tokens

from lightning_base.assignment import balanced_assignment
from lightning_base.instantiation import ConfigError
from lightning_base.routing import Sinkhorn
from lightning_base.routing.sinkhorn import sinkhorn_log_plan


def sinkhorn(**options: object) -> Sinkhorn:
    router = build_router("sinkhorn", **options)
    assert isinstance(router, Sinkhorn)
    return router


def logits(num_tokens: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts, generator=generator) + torch.randn(num_experts, generator=generator)


def test_the_plan_of_two_tokens_by_hand() -> None:
    # exp(logits) = [[4, 1], [1, 1]]. A plan of row and column sums 1 is [[p, 1 - p], [1 - p, p]], and scaling rows and
    # columns keeps the cross ratio p^2 / (1 - p)^2 = 4 * 1 / (1 * 1), so p = 2/3.
    plan = sinkhorn_log_plan(torch.tensor([[4.0, 1.0], [1.0, 1.0]]).log(), 200, 0.0).exp()
    torch.testing.assert_close(plan, torch.tensor([[2, 1], [1, 2]]) / 3)


def plan_of_pot(scores: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    """The plan that POT finds, whose total mass of 1 is scaled to one per token."""
    ot = pytest.importorskip("ot", reason="needs the bench extra")
    num_tokens, num_experts = scores.shape
    masses = np.full(num_tokens, 1 / num_tokens), np.full(num_experts, 1 / num_experts)
    options = {"reg": temperature, "stopThr": 1e-12, "numItermax": 5_000}
    return num_tokens * ot.sinkhorn(*masses, -scores.double().numpy(), **options)


@pytest.mark.parametrize("shape", [(40, 8), (7, 3), (3, 8), (5, 1)], ids=str)
def test_the_plan_is_the_fixed_point_of_another_implementation(shape: tuple[int, int]) -> None:
    num_tokens, num_experts = shape
    scores = logits(*shape)
    expected = plan_of_pot(scores)
    plan = sinkhorn_log_plan(scores, 5_000, 1e-6).exp()
    assert plan.numpy() == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(plan.sum(1), torch.ones(num_tokens))
    torch.testing.assert_close(plan.sum(0), torch.full((num_experts,), num_tokens / num_experts))


def test_iterations_stop_at_the_tolerance_or_at_the_cap() -> None:
    scores = 3 * logits(40, 8)

    def off(iterations: int, tolerance: float) -> float:
        return float((sinkhorn_log_plan(scores, iterations, tolerance).exp().sum(0) / 5 - 1).abs().max())

    assert off(1_000, 1e-5) < 2e-5
    assert 1e-3 < off(1_000, 0.01) < 0.0101
    assert off(2, 1e-5) > off(5, 1e-5) > 1e-3


def test_large_scores_do_not_overflow() -> None:
    plan = sinkhorn_log_plan(1_000 * logits(24, 4), 500, 1e-3).exp()
    assert bool(torch.isfinite(plan).all())


def test_training_sends_a_token_to_its_largest_entry_with_the_sigmoid_of_its_score() -> None:
    router = sinkhorn(temperature=0.5)
    tokens, ids = random_tokens(64)
    plan = router(tokens, ids, groups_of(40, 24))
    scores = (tokens @ router.centroids.T).detach()
    for first, last in ((0, 40), (40, 64)):
        expected = plan_of_pot(scores[first:last], 0.5)
        assert plan.expert_index[first:last].tolist() == expected.argmax(1).tolist()
    assert plan.expert_index.tolist() != scores.argmax(1).tolist()
    for t in range(64):
        gate = 1 / (1 + 2.718281828459045 ** -scores[t, plan.expert_index[t]].item())
        assert plan.weight[t].item() == pytest.approx(gate, rel=1e-5)


def test_evaluation_is_greedy_unless_asked_otherwise() -> None:
    router = sinkhorn()
    tokens, ids = random_tokens(64)
    in_training = router(tokens, ids, groups_of(64)).expert_index
    router.eval()
    scores = (tokens @ router.centroids.T).detach()
    assert router(tokens, ids, groups_of(64)).expert_index.tolist() == scores.argmax(1).tolist()
    router.evaluation_mode = "balanced"
    assert torch.equal(router(tokens, ids, groups_of(64)).expert_index, in_training)


def test_several_experts_are_weighed_by_the_softmax_over_all() -> None:
    router = sinkhorn(top_k=2).eval()
    tokens, ids = random_tokens(16)
    plan = router(tokens, ids, groups_of(16))
    expected = (tokens @ router.centroids.T).softmax(-1).topk(2, dim=1)
    assert plan.expert_index.view(16, 2).tolist() == expected.indices.tolist()
    torch.testing.assert_close(plan.weight.view(16, 2), expected.values)


def test_the_load_is_more_even_than_greedy_but_not_balanced() -> None:
    router = sinkhorn()
    tokens, ids = random_tokens(512)
    tokens = tokens + 20 * router.centroids[0].detach()
    balanced = router.train()(tokens, ids, groups_of(512)).demand
    greedy = router.eval()(tokens, ids, groups_of(512)).demand
    assert greedy.max() > 2 * 64
    assert 64 < int(balanced.max()) < 1.5 * 64
    # All tokens alike go to one expert, whatever the plan: its rows are all the same.
    same = router.train()(tokens[:1].repeat(64, 1), ids[:64], groups_of(64)).demand
    assert sorted(same.tolist()) == [0] * 7 + [64]


def test_towards_temperature_zero_it_is_the_exact_assignment() -> None:
    scores = logits(64, 8)
    exact = balanced_assignment(scores)
    shares = []
    for temperature in (1.0, 0.1, 0.01):
        chosen = sinkhorn_log_plan(scores / temperature, 20_000, 1e-5).argmax(1)
        shares.append((chosen == exact.expert).float().mean().item())
    assert shares[0] < shares[1] <= shares[2]
    assert shares[2] > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "auction"}, r"router\.solver='auction' contradicts Sinkhorn: .*router=base"),
        ({"temperature": 0.0}, r"router\.temperature=0\.0: a temperature is a number above 0"),
        ({"iterations": 0}, r"router\.iterations=0: a plan needs at least 1 iteration"),
        ({"tolerance": -1.0}, r"router\.tolerance=-1\.0: a tolerance is a number of at least 0"),
        ({"num_experts": 17}, r"router\.num_experts=17 exceeds model\.width=16: Sinkhorn starts from orthogonal"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sinkhorn(**options)
