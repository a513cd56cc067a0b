"""DropIn by itself: what it gives, keeps and adds up. T tokens, D width, E experts, n assignments per expert."""

import copy

import pytest
import torch
from router_arms import ROUTERS, VOCABULARY, build_router
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_base import (
    BASE,
    DropIn,
    Experts,
    LossFree,
    Router,
    RoutingPlan,
    SparseLayer,
    Switch,
    TopK,
    auxiliary_loss,
    drop_ins,
    end_step,
    read_inputs,
)

WIDTH = 16
every_router = pytest.mark.parametrize("name", ROUTERS)


def layer_of(router: Router, *, routing_group: int = 2, residual: bool = True) -> SparseLayer:
    """A layer whose experts all do something, the same for every router and residual."""
    torch.manual_seed(0)
    experts = Experts(num_experts=router.num_experts, width=WIDTH, hidden_width=24)
    for w2 in experts.w2:
        nn.init.normal_(w2, std=0.3, generator=torch.Generator().manual_seed(1))
    return SparseLayer(router, experts, routing_group=routing_group, residual=residual)


def switch(**options: object) -> Switch:
    return Switch(num_experts=4, width=WIDTH, **options)  # type: ignore[arg-type]


def example(sequences: int = 4, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(sequences, length, WIDTH, generator=torch.Generator().manual_seed(seed))


@every_router
def test_it_gives_the_hidden_states_of_its_layer_and_keeps_the_plan_without_a_graph(name: str) -> None:
    layer, hidden = layer_of(build_router(name)), example()
    ids = torch.arange(24).view(4, 6)
    expected, plan = copy.deepcopy(layer)(hidden, ids)
    drop_in = DropIn(layer)
    assert torch.equal(drop_in(hidden, ids), expected)
    assert drop_in.plan is not None
    assert torch.equal(drop_in.plan.expert_index, plan.expert_index)
    assert torch.equal(drop_in.plan.weight, plan.weight)
    assert not drop_in.plan.weight.requires_grad


class Counting(Switch):
    """A test double: Switch that keeps what it is told at the end of a step."""

    def step_sums(self, plan: RoutingPlan) -> dict[str, Tensor]:
        return {"tokens": torch.tensor(plan.num_tokens)}

    def end_step(self, sums: dict[str, Tensor]) -> None:
        self.heard = [*getattr(self, "heard", []), {name: int(value) for name, value in sums.items()}]


@pytest.mark.parametrize("mode", ["plain", "not reentrant", "reentrant"])
def test_a_router_is_told_of_every_token_of_a_step_once(mode: str) -> None:
    router = Counting(num_experts=4, width=WIDTH)
    model = DropIn(layer_of(router)).train()
    for micro_batches in (1, 2):
        for seed in range(micro_batches):
            hidden = example(seed=seed).requires_grad_()
            output = model(hidden) if mode == "plain" else checkpoint(model, hidden, use_reentrant=mode == "reentrant")
            output.square().mean().backward()
        end_step(model)
    assert router.heard == [{"tokens": 24}, {"tokens": 48}]


@pytest.mark.parametrize("valid", [None, torch.tensor([[True] * 6, [True] * 2 + [False] * 4] * 2)], ids=["", "padded"])
def test_without_residual_it_gives_what_the_experts_add(valid: Tensor | None) -> None:
    router, hidden = switch(), example()
    whole, _ = layer_of(router)(hidden, None, valid)
    added, _ = layer_of(router, residual=False)(hidden, None, valid)
    torch.testing.assert_close(added, whole - hidden)
    assert bool(added.any())
    if valid is not None:
        assert not bool(added[~valid].any())


def test_auxiliary_losses_are_averaged_over_the_layers_that_have_them() -> None:
    first = DropIn(layer_of(switch()))
    second = DropIn(layer_of(switch()), loss_coefficients={"load_balancing_loss": 0.5})
    z_loss = DropIn(layer_of(TopK(num_experts=4, width=WIDTH, z_loss=True)))
    model = nn.Sequential(first, second, z_loss, DropIn(layer_of(BASE(num_experts=4, width=WIDTH))))
    assert auxiliary_loss(model).item() == 0
    hidden = example()
    expected = {"load_balancing_loss": [], "router_z_loss": []}
    for drop_in, coefficient in zip(model, (0.01, 0.5, 0.01), strict=False):
        hidden, plan = copy.deepcopy(drop_in.layer)(hidden)
        expected["load_balancing_loss"].append(coefficient * plan.losses["load_balancing_loss"].item())
        if "router_z_loss" in plan.losses:
            expected["router_z_loss"].append(0.001 * plan.losses["router_z_loss"].item())
    model(example())
    # Three layers balance, one of them keeps logits small as well, and BASE has nothing of the kind.
    assert [len(values) for values in expected.values()] == [3, 1]
    mean = sum(expected["load_balancing_loss"]) / 3 + expected["router_z_loss"][0]
    assert auxiliary_loss(model).item() == pytest.approx(mean, rel=1e-5)


def test_a_loss_over_the_step_of_one_pass_is_that_over_all_its_tokens() -> None:
    router = switch(balance_scope="step")
    drop_in = DropIn(layer_of(router))
    # One routing group of all sequences: the same tokens, and a loss that a plan holds ready.
    whole = layer_of(switch(), routing_group=4)
    whole.router.load_state_dict(router.state_dict())
    _, plan = whole(example())
    drop_in(example())
    loss = auxiliary_loss(drop_in)
    assert loss.item() == pytest.approx(0.01 * plan.losses["load_balancing_loss"].item(), rel=1e-5)
    loss.backward()
    assert router.gate.weight.grad is not None
    assert bool(router.gate.weight.grad.any())


def test_evaluation_leaves_neither_losses_nor_statistics() -> None:
    router = LossFree(num_experts=4, width=WIDTH)
    model = nn.Sequential(DropIn(layer_of(router)), DropIn(layer_of(switch()))).eval()
    model(example())
    assert auxiliary_loss(model).item() == 0
    end_step(model)
    assert router.bias_steps.tolist() == [0, 0, 0, 0]
    assert all(drop_in.plan is not None for drop_in in drop_ins(model).values())


def loss_free_model() -> tuple[nn.Sequential, LossFree]:
    torch.manual_seed(0)
    router = LossFree(num_experts=4, width=WIDTH)
    # More than one thing after the layer, so that computing again goes past it.
    return nn.Sequential(DropIn(layer_of(router)), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1)), router


@pytest.mark.parametrize("mode", ["plain", "not reentrant", "reentrant"])
def test_the_bias_moves_once_a_step_by_what_all_its_passes_asked_for(mode: str) -> None:
    model, router = loss_free_model()
    drop_in = model[0]
    assert isinstance(drop_in, DropIn)
    demand = torch.zeros(4, dtype=torch.int64)
    calls: list[int] = []
    drop_in.register_forward_hook(lambda *_: calls.append(1))
    for seed in range(3):
        hidden = example(seed=seed).requires_grad_()
        output = model(hidden) if mode == "plain" else checkpoint(model, hidden, use_reentrant=mode == "reentrant")
        assert drop_in.plan is not None
        demand += drop_in.plan.demand
        output.square().sum().backward()
    assert len(calls) == (3 if mode == "plain" else 6)
    # b += u sign(mean n - n) with the n of 3 passes of 24 tokens.
    assert int(demand.sum()) == 3 * 24 * router.top_k
    expected = [(demand.sum() > 4 * n).long() - (demand.sum() < 4 * n).long() for n in demand]
    end_step(model)
    assert router.bias_steps.tolist() == [int(sign) for sign in expected]
    assert any(router.bias_steps.tolist())
    end_step(model)
    assert router.bias_steps.tolist() == [int(sign) for sign in expected], "a step without a pass moves nothing"


def test_a_loss_without_gradient_says_why() -> None:
    model = nn.Sequential(DropIn(layer_of(switch())), nn.Linear(WIDTH, 1))
    checkpoint(model, example().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"load_balancing_loss of 0 has no gradient.*use_reentrant=False"):
        auxiliary_loss(model)
    checkpoint(model, example().requires_grad_(), use_reentrant=False)
    auxiliary_loss(model).backward()
    assert bool(model[0].layer.router.gate.weight.grad.any())


class Reads(nn.Module):
    """A model whose layers see nothing but hidden states."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden: Tensor, words: Tensor | None = None, *, real: Tensor | None = None) -> Tensor:
        return self.layers(hidden)


@every_router
def test_what_is_read_from_the_model_is_as_good_as_given(name: str) -> None:
    layer, hidden = layer_of(build_router(name)), example()
    ids = torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(3))
    valid = torch.tensor([[True] * 6, [True] * 5 + [False]] * 2)
    expected, _ = copy.deepcopy(layer)(hidden, ids, valid)
    # The second layer is given tokens without their sequences: all of them are one group, as with one sequence.
    model = Reads(DropIn(layer))
    handle = read_inputs(model, token_ids="words", valid="real")
    assert torch.equal(model(hidden, ids, real=valid.long()), expected)
    assert torch.equal(copy.deepcopy(model)(hidden, real=valid, words=ids), expected)
    handle.remove()
    model.layers[0]._token_ids = model.layers[0]._valid = None
    if layer.router.needs_token_ids:
        with pytest.raises(ValueError, match=f"{type(layer.router).__name__} routes by token ids"):
            model(hidden, ids, real=valid)
    else:
        model(hidden, ids, real=valid)
        assert model.layers[0].plan.num_tokens == 24


def test_what_was_read_has_to_fit() -> None:
    model = Reads(nn.Flatten(0, 1), DropIn(layer_of(switch())))
    read_inputs(model, token_ids=None, valid="real")
    valid = torch.tensor([[True] * 6, [True] * 5 + [False]] * 2)
    # The tokens of all sequences as one.
    model(example(), real=valid)
    assert model.layers[1].plan.groups.sizes == (22,)
    with pytest.raises(ValueError, match=r"valid read from the model is \[4, 5\], and the layer got hidden \[24, 16\]"):
        model(example(), real=valid[:, :5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: read_inputs(Reads(), token_ids="word"),
            "token_ids=word: the forward of Reads has no such argument; did you mean words",
        ),
        (
            lambda: DropIn(layer_of(switch()), loss_coefficients={"load_balance_loss": 1.0}),
            "load_balance_loss: Switch has no such loss; did you mean load_balancing_loss",
        ),
    ],
)
def test_names_that_do_not_exist_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
