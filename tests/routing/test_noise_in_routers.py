"""Routers with noise: another plan at another step and in another layer, and none in evaluation."""

import pytest
from router_arms import ROUTERS, WIDTH, build_router, decisions, groups_of, random_tokens

from lightning_base.model import Transformer, initialize

# A router that draws keeps its key and the step it has come to; a new one is tested without a line here.
NOISY = [name for name in ROUTERS if {"key", "step"} <= set(build_router(name).state_dict())]
every_noisy_router = pytest.mark.parametrize("name", NOISY)


def test_the_routers_with_noise_are_found() -> None:
    assert {"noisy_top_k", "gshard", "random"} <= set(NOISY)


@every_noisy_router
def test_another_step_draws_again_and_a_checkpoint_knows_the_step(name: str) -> None:
    router = build_router(name)
    tokens, ids = random_tokens(64)
    plans = []
    for _ in range(3):
        plans.append(decisions(router(tokens, ids, groups_of(64))))
        router.end_step({})
    assert len({str(plan) for plan in plans}) == 3
    resumed = build_router(name, seed=9)
    resumed.load_state_dict(router.state_dict())
    assert decisions(resumed(tokens, ids, groups_of(64))) == decisions(router(tokens, ids, groups_of(64)))


@every_noisy_router
def test_evaluation_is_the_same_at_every_step(name: str) -> None:
    router = build_router(name).eval()
    tokens, ids = random_tokens(64)
    before = decisions(router(tokens, ids, groups_of(64)))
    router.end_step({})
    assert decisions(router(tokens, ids, groups_of(64))) == before


@every_noisy_router
def test_layers_draw_for_themselves(name: str) -> None:
    model = Transformer(
        vocab_size=100,
        sequence_length=12,
        width=WIDTH,
        depth=4,
        heads=2,
        ffn_width=48,
        make_router=lambda: build_router(name),
        routing_group=2,
    )
    initialize(model, 0)
    first, second = (layer.router for layer in model.sparse_layers.values())
    assert int(first.key) != int(second.key)
