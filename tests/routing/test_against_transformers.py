"""Switch and top-k against the transformers library: same weights, same outputs, losses and gradients.

Where the architectures differ, they are made to coincide without touching either routing:

- A layer here is h + sum of weight * (f_e(h) - h) with f_e(h) - h = W2 relu(W1 LayerNorm(h)), and its router sees
  LayerNorm(h). Theirs is h + block(norm(h)), with experts W2 relu(W1 x) in Switch. So their block is given
  LayerNorm(h), without gain, and h is added to what it returns: then both are the same function, also of h.
- Mixtral's expert has a third matrix, W2 (silu(W1 x) * W3 x). Our layer is given Mixtral's own experts, called with one
  expert per token and a weight of 1: what is compared is who goes where, the weights, and the combination.

B sequences, L positions, D width, H hidden width, E experts, K experts per token, A assignments.
"""

from typing import NamedTuple

import pytest
import torch
from router_arms import groups_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, SwitchTransformersConfig
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from lightning_base.moe import Experts, SparseLayer
from lightning_base.routing import RoutingPlan, Switch, TopK
from lightning_base.routing.losses import router_z_loss

B, L, D, H, E = 3, 20, 16, 24, 4


class Results(NamedTuple):
    """What one implementation makes of the same input, and the gradients of the same scalar."""

    output: Tensor
    balance: Tensor
    gradients: dict[str, Tensor]


def example() -> tuple[Tensor, Tensor]:
    """Hidden states that all lean to one side, so that experts overflow, and a direction to take gradients in."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, L, D, generator=generator) + torch.linspace(-1, 1, D)
    return hidden, torch.randn(B, L, D, generator=generator)


def fill(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def results(output: Tensor, balance: Tensor, upstream: Tensor, of: dict[str, Tensor]) -> Results:
    total = (output * upstream).sum() + 10 * balance
    return Results(
        output.detach(), balance.detach(), dict(zip(of, torch.autograd.grad(total, of.values()), strict=True))
    )


def check_equal(ours: Results, theirs: Results) -> None:
    torch.testing.assert_close(ours.output, theirs.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.balance, theirs.balance, rtol=1e-6, atol=1e-6)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in ours.gradients.items():
        assert gradient.abs().max() > 1e-3, f"{name}: nothing to compare"
        torch.testing.assert_close(gradient, theirs.gradients[name], rtol=1e-4, atol=1e-4, msg=name)


def their_switch(capacity: int) -> nn.Module:
    config = SwitchTransformersConfig(
        d_model=D, d_ff=H, num_experts=E, expert_capacity=capacity, dropout_rate=0.0, router_jitter_noise=0.0
    )
    block = switch.SwitchTransformersSparseMLP(config)
    fill(block)
    return block


def our_switch(block: nn.Module, capacity_factor: float | None) -> SparseLayer:
    """Capacity there is counted in each sequence, so a routing group is one sequence."""
    router = Switch(num_experts=E, width=D, capacity_factor=capacity_factor)
    experts = Experts(num_experts=E, width=D, hidden_width=H)
    with torch.no_grad():
        router.gate.weight.copy_(block.router.classifier.weight)
        for e in range(E):
            experts.w1[0][e] = block.experts[f"expert_{e}"].wi.weight.T
            experts.w2[0][e] = block.experts[f"expert_{e}"].wo.weight.T
    return SparseLayer(router, experts, routing_group=1)


@pytest.mark.parametrize(("capacity_factor", "slots"), [(None, L), (1.0, 5), (0.6, 3)])
def test_switch_is_theirs(capacity_factor: float | None, slots: int) -> None:
    # 20 tokens over 4 experts: a capacity factor of 1 gives 5 slots each, of 0.6 gives 3, and 20 are never too few.
    block = their_switch(slots)
    layer = our_switch(block, capacity_factor)
    hidden, upstream = example()

    mine = hidden.clone().requires_grad_()
    output, plan = layer(mine, torch.zeros(B, L, dtype=torch.int64))
    parameters = {
        "hidden": mine,
        "gate": layer.router.gate.weight,
        "w1": layer.experts.w1[0],
        "w2": layer.experts.w2[0],
    }
    ours = results(output, plan.losses["load_balancing_loss"], upstream, parameters)
    if capacity_factor:
        assert len(plan.token_index) < B * L, "nothing was dropped: the capacity is not tested"

    theirs_hidden = hidden.clone().requires_grad_()
    seen = F.layer_norm(theirs_hidden, (D,))
    expected = theirs_hidden + block(seen)
    dispatched, gate, logits = block.router(seen)
    # Their loss counts where tokens wanted to go, as ours does; the router masks its answer by capacity.
    balance = switch.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    experts = [block.experts[f"expert_{e}"] for e in range(E)]
    inner = [expert.wi.weight for expert in experts] + [expert.wo.weight for expert in experts]
    found = results(
        expected,
        balance,
        upstream,
        {"hidden": theirs_hidden, "gate": block.router.classifier.weight, **{str(i): w for i, w in enumerate(inner)}},
    )
    gradients = {name: found.gradients[name] for name in ("hidden", "gate")}
    gradients["w1"] = torch.stack([found.gradients[str(e)].T for e in range(E)])
    gradients["w2"] = torch.stack([found.gradients[str(E + e)].T for e in range(E)])
    check_equal(ours, found._replace(gradients=gradients))

    # Who goes where, and the weights of those who are served.
    served = dispatched.flatten(0, 1).nonzero()
    order = plan.token_index.argsort()
    assert torch.stack([plan.token_index, plan.expert_index], 1)[order].tolist() == served.tolist()
    torch.testing.assert_close(plan.weight[order], gate.flatten()[served[:, 0]])


def test_the_router_z_loss_is_theirs() -> None:
    logits = 3 * torch.randn(B, L, E, generator=torch.Generator().manual_seed(2))
    expected = switch.router_z_loss_func(logits)
    torch.testing.assert_close(router_z_loss(logits.flatten(0, 1), groups_of(*[L] * B)), expected)


class MixtralsExperts(Experts):
    """Mixtral's experts behind our interface: f_e(x) - x is Mixtral's expert e of LayerNorm(x)."""

    def __init__(self, theirs: nn.Module) -> None:
        nn.Module.__init__(self)
        self.num_experts = E
        self.theirs = theirs

    def forward(self, tokens_AD: Tensor, counts: Tensor) -> Tensor:
        expert_A1 = torch.arange(E).repeat_interleave(counts)[:, None]
        return self.theirs(F.layer_norm(tokens_AD, (D,)), expert_A1, torch.ones(len(tokens_AD), 1))


@pytest.mark.parametrize("k", [2, 3])
def test_top_k_is_mixtrals(k: int) -> None:
    config = MixtralConfig(
        hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=k, router_jitter_noise=0.0
    )
    config._experts_implementation = "eager"
    block = mixtral.MixtralSparseMoeBlock(config)
    fill(block)
    router = TopK(num_experts=E, width=D, top_k=k, renormalize=True)
    with torch.no_grad():
        router.gate.weight.copy_(block.gate.weight)
    # Mixtral's loss is over all tokens of the batch: one routing group.
    layer = SparseLayer(router, MixtralsExperts(block.experts), routing_group=B)
    hidden, upstream = example()
    shared = {"gate_up": block.experts.gate_up_proj, "down": block.experts.down_proj}

    mine = hidden.clone().requires_grad_()
    output, plan = layer(mine, torch.zeros(B, L, dtype=torch.int64))
    ours = results(
        output,
        plan.losses["load_balancing_loss"],
        upstream,
        {"hidden": mine, "gate": router.gate.weight, **shared},
    )

    theirs_hidden = hidden.clone().requires_grad_()
    seen = F.layer_norm(theirs_hidden, (D,))
    expected = theirs_hidden + block(seen)
    logits, weight_TK, expert_TK = block.gate(seen)
    # Their f_e sums over the k choices of a token without dividing by k, so that a uniform router has a loss of k where
    # the Switch paper's is 1; ours divides.
    balance = mixtral.load_balancing_loss_func((logits,), E, k) / k
    found = results(expected, balance, upstream, {"hidden": theirs_hidden, "gate": block.gate.weight, **shared})
    check_equal(ours, found)
    assert by_token(plan) == [
        sorted((e, round(w, 5)) for e, w in zip(experts, weights, strict=True))
        for experts, weights in zip(expert_TK.tolist(), weight_TK.tolist(), strict=True)
    ]


def by_token(plan: RoutingPlan) -> list[list[tuple[int, float]]]:
    found: list[list[tuple[int, float]]] = [[] for _ in range(plan.num_tokens)]
    for token, expert, weight in zip(
        plan.token_index.tolist(), plan.expert_index.tolist(), plan.weight.tolist(), strict=True
    ):
        found[token].append((expert, round(weight, 5)))
    return [sorted(experts) for experts in found]
