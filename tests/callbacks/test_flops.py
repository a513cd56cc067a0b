"""The FLOPs of a run's ledger, for every way in which experts are computed."""

import pytest
import torch
from tiny_training import LENGTH, WIDTH, language_model, micro_batches

from lightning_base.callbacks.flops import count_flops
from lightning_base.module import LanguageModel


def with_activation(router: str, activation: str) -> LanguageModel:
    # Alone in its group a token can be sent anywhere: the experts' loads are uneven.
    module = language_model(router, max_steps=1, router_options={"num_experts": 4})
    for layer in module.model.sparse_layers.values():
        experts = type(layer.experts)(num_experts=4, width=WIDTH, hidden_width=32, activation=activation)
        layer.experts.activation = experts.activation
        with torch.no_grad():
            for w2 in layer.experts.w2:
                w2.normal_()
    return module


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("router", ["switch", "uniform"])
def test_experts_cost_their_two_products_and_twice_that_backward(router: str, activation: str) -> None:
    (batch,) = micro_batches(0)
    found = count_flops(with_activation(router, activation), batch)
    # D = 16, H = 32: 2 D H for each of two products, and in the backward pass one for each of its two factors.
    assert found["expert_flops_per_token"] == pytest.approx(3 * 2 * 2 * 16 * 32)
    # Attention 4 D^2 and 2 L D for keys and values, in both blocks; one feed-forward layer is dense; the logits 48 D.
    router_products = 16 * 4 if router == "switch" else 0
    rest = 2 * (4 * 16**2 + 2 * LENGTH * 16) + 2 * 16 * 32 + 48 * 16 + router_products
    assert found["flops_per_token"] == pytest.approx(6 * rest + 3 * 2 * 2 * 16 * 32)
