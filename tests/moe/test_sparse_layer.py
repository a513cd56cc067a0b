"""The layer against plain loops over tokens, experts and sublayers.

B sequences, L positions, D width, T tokens that are not padding, E experts.
"""

import copy

import pytest
import torch
from router_arms import ROUTERS, WIDTH, build_router, groups_of
from torch import Tensor

from lightning_base.moe import Experts, SparseLayer
from lightning_base.moe.layer import set_evaluation_mode
from lightning_base.routing import BASE, RoutingPlan

ARMS = [pytest.param(name, {}, id=name) for name in ROUTERS] + [
    pytest.param("switch", {"capacity_factor": 0.5, "evaluation_capacity_factor": 0.5}, id="switch-with-drops"),
    pytest.param("top_k", {"top_k": 3, "capacity_factor": 0.5}, id="top_k-3-with-drops"),
]
every_arm = pytest.mark.parametrize(("name", "options"), ARMS)
ACTIVATION = {"relu": torch.relu, "silu": lambda x: x * torch.sigmoid(x), "gelu": torch.nn.functional.gelu}


def make_layer(name: str, *, sublayers: int = 1, activation: str = "relu", **options: object) -> SparseLayer:
    """A layer whose experts all do something, routing two sequences together."""
    router_norm = bool(options.pop("router_norm", True))
    router = build_router(name, **options)
    experts = Experts(
        num_experts=router.num_experts, width=WIDTH, hidden_width=24, sublayers=sublayers, activation=activation
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return SparseLayer(router, experts, routing_group=2, router_norm=router_norm)


def example(sequences: int = 4, length: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sequences, length, WIDTH, generator=generator)
    return hidden.requires_grad_(), torch.randint(0, 50, (sequences, length), generator=generator)


def layer_norm(x_D: Tensor) -> Tensor:
    centred = x_D - x_D.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt()


def expert_by_loop(experts: Experts, expert: int, x_D: Tensor, activation: str = "relu") -> Tensor:
    """f_e(x) of one token: x + W2 act(W1 LayerNorm(x)), once per sublayer."""
    for w1, w2 in zip(experts.w1, experts.w2, strict=True):
        x_D = x_D + ACTIVATION[activation](layer_norm(x_D) @ w1[expert]) @ w2[expert]
    return x_D


def layer_by_loop(layer: SparseLayer, hidden: Tensor, plan: RoutingPlan, activation: str = "relu") -> Tensor:
    """h + sum of weight * (f_e(h) - h) over the assignments of each token, one at a time; no padding."""
    inputs = list(hidden.reshape(-1, WIDTH))
    outputs = list(inputs)
    for a in range(len(plan.token_index)):
        token, expert = int(plan.token_index[a]), int(plan.expert_index[a])
        x_D = inputs[token]
        outputs[token] = outputs[token] + plan.weight[a] * (
            expert_by_loop(layer.experts, expert, x_D, activation) - x_D
        )
    return torch.stack(outputs).view_as(hidden)


def gradients(output: Tensor, layer: SparseLayer, hidden: Tensor) -> dict[str, Tensor]:
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    named = {"hidden": hidden, **dict(layer.named_parameters())}
    found = torch.autograd.grad((output * upstream).sum(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def check_against_loop(layer: SparseLayer, hidden: Tensor, ids: Tensor, activation: str = "relu") -> RoutingPlan:
    output, plan = copy.deepcopy(layer)(hidden, ids)
    # Anew, with a graph of its own: the router sees LayerNorm(h), two sequences to a group.
    flat = hidden.reshape(-1, WIDTH)
    seen = torch.stack([layer_norm(x) for x in flat]) if layer.router_norm else flat
    length = hidden.shape[1]
    sizes = [2 * length] * (hidden.shape[0] // 2) + [length] * (hidden.shape[0] % 2)
    again = copy.deepcopy(layer.router)
    again_plan = again(seen, ids.flatten(), groups_of(*sizes))
    assert torch.equal(again_plan.expert_index, plan.expert_index)
    assert again_plan.groups == plan.groups

    twin, reference = copy.deepcopy(layer), copy.deepcopy(layer)
    reference.router = again
    got = gradients(twin(hidden, ids)[0], twin, hidden)
    by_loop = layer_by_loop(reference, hidden, again_plan, activation)
    expected = gradients(by_loop, reference, hidden)
    torch.testing.assert_close(output, by_loop, atol=1e-5, rtol=1e-4)
    assert got.keys() == expected.keys()
    for parameter, gradient in got.items():
        torch.testing.assert_close(
            gradient, expected[parameter], atol=1e-4, rtol=1e-3, msg=lambda m, p=parameter: f"{p}: {m}"
        )
    return plan


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@every_arm
def test_outputs_and_gradients_are_those_of_a_loop(name: str, options: dict, mode: str) -> None:
    layer = make_layer(name, **options).train(mode == "training")
    check_against_loop(layer, *example())


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_every_activation_is_the_one_it_is_called(activation: str) -> None:
    check_against_loop(make_layer("switch", activation=activation), *example(), activation)


@pytest.mark.parametrize("name", ["base", "switch", "dense"])
def test_experts_of_three_sublayers_are_stacks_of_residual_blocks(name: str) -> None:
    check_against_loop(make_layer(name, sublayers=3), *example())


def test_the_examples_run_equal_and_unequal_counts_and_an_expert_without_tokens() -> None:
    # So that the comparisons above mean something: BASE in training has equal counts, in evaluation unequal ones.
    hidden, ids = example(sequences=4, length=8)
    layer = make_layer("base")
    assert check_against_loop(layer.train(), hidden, ids).load.tolist() == [4] * 8
    assert len(set(check_against_loop(layer.eval(), hidden, ids).load.tolist())) > 1
    hidden, ids = example(sequences=1, length=5)
    assert 0 in check_against_loop(layer.train(), hidden, ids).load.tolist()


def test_base_is_its_formula_with_gates_computed_by_hand() -> None:
    """h + a (f(h) - h), a = sigmoid(h . w), with h itself scored: the released layer."""
    layer = make_layer("base", router_norm=False)
    router = layer.router
    assert isinstance(router, BASE)
    hidden, ids = example(sequences=2, length=8)
    output, plan = layer(hidden, ids)
    expected = []
    for token, h_D in enumerate(hidden.reshape(-1, WIDTH)):
        expert = int(plan.expert_index[token])
        gate = torch.sigmoid((h_D * router.centroids[expert]).sum())
        expected.append((1 - gate) * h_D + gate * expert_by_loop(layer.experts, expert, h_D))
    by_hand = torch.stack(expected).view_as(hidden)
    torch.testing.assert_close(output, by_hand, atol=1e-5, rtol=1e-4)
    got, wanted = gradients(output, layer, hidden), gradients(by_hand, layer, hidden)
    for parameter in ("hidden", "router.centroids", "experts.w1.0", "experts.w2.0"):
        torch.testing.assert_close(got[parameter], wanted[parameter], atol=1e-4, rtol=1e-3)


@every_arm
def test_a_fresh_layer_is_the_identity(name: str, options: dict) -> None:
    layer = make_layer(name, **options)
    layer.experts.reset_parameters()
    hidden, ids = example()
    assert torch.equal(layer(hidden, ids)[0], hidden)


# The last sequence is all padding, the third all tokens.
LENGTHS = (5, 2, 9, 0)


def padded_example() -> tuple[Tensor, Tensor, Tensor]:
    hidden, ids = example()
    return hidden, ids, torch.tensor([[position < n for position in range(9)] for n in LENGTHS])


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@every_arm
def test_padding_passes_through_takes_no_slot_and_never_counts(name: str, options: dict, mode: str) -> None:
    layer = make_layer(name, **options).train(mode == "training")
    hidden, ids, valid = padded_example()
    output, plan = copy.deepcopy(layer)(hidden, ids, valid)
    assert torch.equal(output[~valid], hidden[~valid])
    # Groups of two sequences: 5 + 2 and 9 + 0 tokens.
    assert plan.groups.sizes == (7, 9)
    assert 16 <= int(plan.asked) <= 16 * layer.router.top_k

    other_hidden, other_ids = hidden.detach().clone(), ids.clone()
    other_hidden[~valid], other_ids[~valid] = 100.0, 7
    other_output, other_plan = copy.deepcopy(layer)(other_hidden, other_ids, valid)
    assert torch.equal(other_output[valid], output[valid])
    assert torch.equal(other_plan.group_demand, plan.group_demand)

    # What the tokens alone would get.
    tokens, token_ids = hidden[valid], ids[valid]
    alone = copy.deepcopy(layer.router)(torch.stack([layer_norm(x) for x in tokens]), token_ids, groups_of(7, 9))
    assert torch.equal(plan.group_demand, alone.group_demand)
    by_loop = layer_by_loop(layer, tokens, alone)
    torch.testing.assert_close(output[valid], by_loop, atol=1e-5, rtol=1e-4)


@every_arm
def test_a_mask_without_padding_changes_nothing(name: str, options: dict) -> None:
    layer = make_layer(name, **options)
    hidden, ids = example()
    plain, _ = copy.deepcopy(layer)(hidden, ids)
    masked, _ = copy.deepcopy(layer)(hidden, ids, torch.ones(4, 9, dtype=torch.bool))
    torch.testing.assert_close(masked, plain, atol=1e-6, rtol=1e-6)


@every_arm
def test_nothing_but_padding_still_gives_every_expert_a_gradient(name: str, options: dict) -> None:
    # DistributedDataParallel waits for the gradient of every parameter.
    layer = make_layer(name, **options)
    hidden, ids = example()
    output, plan = layer(hidden, ids, torch.zeros(4, 9, dtype=torch.bool))
    assert torch.equal(output, hidden)
    (output.sum() + sum(plan.losses.values())).backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad == 0).all())


@every_arm
def test_groups_do_not_depend_on_how_sequences_are_batched(name: str, options: dict) -> None:
    layer = make_layer(name, **options)
    hidden, ids = example()
    whole, _ = copy.deepcopy(layer)(hidden, ids)
    halves = [copy.deepcopy(layer)(h, i)[0] for h, i in zip(hidden.split(2), ids.split(2), strict=True)]
    torch.testing.assert_close(torch.cat(halves), whole, atol=1e-5, rtol=1e-5)


def test_tokens_without_an_expert_stay_as_they_are() -> None:
    layer = make_layer("switch", capacity_factor=0.25)
    hidden, ids = example()
    output, plan = layer(hidden, ids)
    reached = set(plan.token_index.tolist())
    left = [t for t in range(36) if t not in reached]
    assert len(left) == plan.tokens_left_behind.item() > 0
    assert torch.equal(output.view(36, -1)[left], hidden.view(36, -1)[left])
    assert not bool((output.view(36, -1)[sorted(reached)] == hidden.view(36, -1)[sorted(reached)]).all(1).any())


def test_the_evaluation_mode_is_set_for_routers_that_know_it_and_reset_by_none() -> None:
    base, switch = make_layer("base"), make_layer("switch")
    for layer in (base, switch):
        set_evaluation_mode(layer, "balanced")
    assert (base.router.evaluation_mode, switch.router.evaluation_mode) == ("balanced", "default")
    set_evaluation_mode(base, None)
    assert base.router.evaluation_mode == "greedy"


def test_mismatched_parts_are_refused() -> None:
    experts = Experts(num_experts=4, width=WIDTH, hidden_width=8)
    with pytest.raises(ValueError, match="the router has 8 experts, the layer 4"):
        SparseLayer(build_router("switch"), experts, routing_group=1)
    with pytest.raises(ValueError, match="routing_group=0: a routing group is at least 1 sequence"):
        SparseLayer(build_router("switch", num_experts=4), experts, routing_group=0)
