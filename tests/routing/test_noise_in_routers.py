"""Routers with noise: the same plan however a step is computed, another plan at another step."""

import pytest
import torch
from router_arms import ROUTERS, WIDTH, build_router, decisions, groups_of, random_tokens

from lightning_base.model import Transformer, initialize
from lightning_base.routing import Router, RoutingPlan

# A router that draws keeps its key and the step it has come to; a new one is tested without a line here.
NOISY = [name for name in ROUTERS if {"key", "step"} <= set(build_router(name).state_dict())]
every_noisy_router = pytest.mark.parametrize("name", NOISY)


def test_the_routers_with_noise_are_found() -> None:
    assert {"noisy_top_k", "gshard", "random"} <= set(NOISY)


@every_noisy_router
def test_two_ranks_with_a_group_each_get_what_one_rank_with_both_gets(name: str) -> None:
    tokens, ids = random_tokens(64)
    together = decisions(build_router(name)(tokens, ids, groups_of(40, 24)))
    first = decisions(build_router(name)(tokens[:40], ids[:40], groups_of(40)))
    second = decisions(build_router(name)(tokens[40:], ids[40:], groups_of(24)))
    assert first + second == together


@every_noisy_router
def test_the_noise_of_a_pass_does_not_depend_on_passes_before_it(name: str) -> None:
    router, other = build_router(name), build_router(name)
    tokens, ids = random_tokens(64)
    torch.manual_seed(1)
    expected = decisions(router(tokens, ids, groups_of(64)))
    torch.manual_seed(2)
    other(*random_tokens(30, seed=5), groups_of(30))
    assert decisions(other(tokens, ids, groups_of(64))) == expected


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


def model_of(name: str, checkpoint_activations: bool) -> tuple[Transformer, dict[str, list[RoutingPlan]]]:
    """A model of two sparse layers, and the plans that each of their routers will make, in order."""

    def make_router() -> Router:
        return build_router(name)

    model = Transformer(
        vocab_size=100,
        sequence_length=12,
        width=WIDTH,
        depth=4,
        heads=2,
        ffn_width=48,
        make_router=make_router,
        routing_group=2,
        checkpoint_activations=checkpoint_activations,
    )
    initialize(model, 0)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    plans: dict[str, list[RoutingPlan]] = {}
    for layer, sparse in model.sparse_layers.items():
        made = plans.setdefault(layer, [])
        sparse.router.register_forward_hook(lambda _module, _inputs, plan, made=made: made.append(plan))
    return model.train(), plans


@every_noisy_router
def test_recomputation_under_activation_checkpointing_repeats_the_plan(name: str) -> None:
    ids = torch.randint(0, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (True, False):
        model, plans = model_of(name, checkpointing)
        output = model(ids)
        auxiliary = sum(loss for plan in output.plans.values() for loss in plan.losses.values())
        (output.logits.square().mean() + auxiliary).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        for made in plans.values():
            assert len(made) == (2 if checkpointing else 1)
            assert all(decisions(plan) == decisions(made[0]) for plan in made)
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], msg=lambda text, key=key: f"{key}: {text}")


@every_noisy_router
def test_layers_draw_for_themselves(name: str) -> None:
    model, _ = model_of(name, False)
    first, second = (layer.router for layer in model.sparse_layers.values())
    assert int(first.key) != int(second.key)
