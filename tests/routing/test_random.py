"""Random routing: even on average, deaf to the text, fixed in evaluation."""

import pytest
import scipy.stats
import torch
from router_arms import build_router, decisions, groups_of, random_tokens

from lightning_base.routing import Random


def random_router(**options: object) -> Random:
    router = build_router("random", **options)
    assert isinstance(router, Random)
    return router


@pytest.mark.parametrize("k", [1, 3, 8])
def test_each_token_goes_to_k_different_experts_with_equal_weights(k: int) -> None:
    plan = random_router(top_k=k)(*random_tokens(50), groups_of(50))
    for experts in decisions(plan):
        assert len({expert for expert, _ in experts}) == k
        assert [weight for _, weight in experts] == pytest.approx([1 / k] * k, abs=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_every_pair_of_experts_is_equally_likely(training: bool) -> None:
    plan = random_router(num_experts=4, top_k=2).train(training)(*random_tokens(6_000), groups_of(6_000))
    pairs: dict[tuple[int, ...], int] = {}
    for experts in decisions(plan):
        pair = tuple(expert for expert, _ in experts)
        pairs[pair] = pairs.get(pair, 0) + 1
    assert len(pairs) == 6
    assert scipy.stats.chisquare(list(pairs.values())).pvalue > 1e-4


def test_evaluation_draws_once_and_for_all() -> None:
    router = random_router().eval()
    tokens, ids = random_tokens(60)
    first = decisions(router(tokens, ids, groups_of(60)))
    router.end_step({})
    assert decisions(router(tokens, ids, groups_of(60))) == first
    training = [decisions(router.train()(tokens, ids, groups_of(60)))]
    router.end_step({})
    training.append(decisions(router(tokens, ids, groups_of(60))))
    assert first not in training
    assert training[0] != training[1]


def test_the_vectors_of_the_tokens_do_not_matter() -> None:
    router = random_router()
    tokens, ids = random_tokens(60)
    assert decisions(router(tokens, ids, groups_of(60))) == decisions(router(-tokens, ids, groups_of(60)))


def test_equal_tokens_at_different_places_go_to_different_experts() -> None:
    plan = random_router()(torch.zeros(64, 16), torch.zeros(64, dtype=torch.int64), groups_of(64))
    # That 64 draws miss one of 8 experts has a chance of 8 * (7/8)^64 = 0.0016.
    assert set(plan.expert_index.tolist()) == set(range(8))


def test_there_is_nothing_to_learn() -> None:
    assert list(random_router().parameters()) == []
    assert random_router().loss_coefficients == {}
