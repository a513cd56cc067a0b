"""What every router promises, whatever its algorithm. T tokens, E experts, k experts per token."""

import copy

import pytest
import torch
from router_arms import ROUTERS, VOCABULARY, WIDTH, build_router, decisions, groups_of, options_of, random_tokens

from lightning_base.instantiation import instantiate
from lightning_base.moe import Experts, SparseLayer
from lightning_base.routing import Router, RoutingGroups, RoutingPlan
from lightning_base.routing.losses import finish_step_loss

MODES = ("training", "evaluation")
# Besides each file as it stands: options that change what a router promises.
ARMS = [pytest.param(name, {}, id=name) for name in ROUTERS] + [
    pytest.param("top_k", {"capacity_factor": 0.5}, id="top_k-with-capacity"),
    pytest.param("top_k", {"top_k": 3, "renormalize": False}, id="top_k-3-not-renormalized"),
    pytest.param("switch", {"capacity_factor": None, "evaluation_capacity_factor": 0.5}, id="switch-dropless"),
    pytest.param("switch", {"balance_scope": "step"}, id="switch-balanced-over-the-step"),
    pytest.param("switch", {"balance_scope": "sequence"}, id="switch-balanced-by-sequence"),
    pytest.param("base", {"top_k": 2}, id="base-2"),
    pytest.param("base", {"solver": "greedy"}, id="base-without-balance"),
    pytest.param("sinkhorn", {"top_k": 2}, id="sinkhorn-2"),
    pytest.param("loss_free", {"sequence_loss": True, "renormalize": True}, id="loss_free-with-sequence-loss"),
    pytest.param("quantile", {"top_k": 1, "iterations": 3}, id="quantile-1"),
    pytest.param("bip", {"top_k": 1, "iterations": 1}, id="bip-1"),
    pytest.param("top_k", {"gate": "sigmoid", "balance_scope": "sequence"}, id="top_k-sigmoid"),
    pytest.param("top_k", {"gate": "sigmoid", "top_k": 1, "renormalize": False}, id="top_k-1-sigmoid"),
    pytest.param("top_k", {"z_loss": True, "balance_scope": "step"}, id="top_k-with-z-loss"),
    pytest.param("noisy_top_k", {"num_experts": 4, "top_k": 3}, id="noisy_top_k-3"),
    pytest.param("gshard", {"capacity_factor": None, "balance_scope": "step"}, id="gshard-dropless"),
    pytest.param("gshard", {"num_experts": 2, "capacity_factor": 0.5}, id="gshard-of-two"),
    pytest.param("expert_choice", {"top_k": 1}, id="expert_choice-1"),
    pytest.param("hash", {"variant": "random"}, id="hash-random"),
    pytest.param("random", {"top_k": 3}, id="random-3"),
]
every_arm = pytest.mark.parametrize(("name", "options"), ARMS)
every_mode = pytest.mark.parametrize("mode", MODES)


def make(name: str, options: dict, mode: str = "training") -> Router:
    return build_router(name, **options).train(mode == "training")


def route(router: Router, tokens: torch.Tensor, ids: torch.Tensor, groups: RoutingGroups) -> RoutingPlan:
    """On a copy and from one seed, so that neither state nor noise carries over from another call."""
    torch.manual_seed(0)
    return copy.deepcopy(router)(tokens, ids, groups)


def check_well_formed(plan: RoutingPlan, router: Router, groups: RoutingGroups) -> None:
    num_tokens, num_experts = groups.num_tokens, router.num_experts
    assert plan.token_index.shape == plan.expert_index.shape == plan.weight.shape
    assert all(0 <= token < num_tokens for token in plan.token_index.tolist())
    assert all(0 <= expert < num_experts for expert in plan.expert_index.tolist())
    pairs = list(zip(plan.token_index.tolist(), plan.expert_index.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs), "a token went to the same expert twice"
    assert plan.num_experts == num_experts
    assert plan.top_k == router.top_k
    asked, most = plan.group_demand.sum(1).tolist(), [size * router.top_k for size in groups.sizes]
    assert all(n <= limit for n, limit in zip(asked, most, strict=True))
    assert asked == most or router.asks_for_fewer
    assert bool(torch.isfinite(plan.weight).all())
    assert all(torch.isfinite(loss) for loss in plan.losses.values())
    assert {*plan.losses, *plan.step_losses} == set(router.loss_coefficients)
    assert not any(value.requires_grad for value in plan.aux.values())

    # Loads counted by hand, group by group.
    group_of_token = [g for g, size in enumerate(groups.sizes) for _ in range(size)]
    load = [[0] * num_experts for _ in groups.sizes]
    for token, expert in pairs:
        load[group_of_token[token]][expert] += 1
    assert plan.group_load.tolist() == load
    assert plan.tokens_left_behind.item() == num_tokens - len({token for token, _ in pairs})
    if plan.capacity is not None:
        assert all(max(row) <= slots for row, slots in zip(load, plan.capacity.tolist(), strict=True))
        demand = plan.group_demand.tolist()
        served = [[min(n, c) for n in row] for row, c in zip(demand, plan.capacity.tolist(), strict=True)]
        assert load == served, "an expert with free slots turned an assignment away"
    else:
        assert len(pairs) == int(plan.asked), "without a capacity nothing is dropped"
        assert load == plan.group_demand.tolist()


@every_mode
@every_arm
@pytest.mark.parametrize("sizes", [(64,), (32, 32), (5, 40, 1, 18)], ids=str)
def test_a_plan_is_well_formed(name: str, options: dict, mode: str, sizes: tuple[int, ...]) -> None:
    router, groups = make(name, options, mode), groups_of(*sizes)
    check_well_formed(route(router, *random_tokens(sum(sizes)), groups), router, groups)


@every_mode
@every_arm
@pytest.mark.parametrize("sizes", [(), (0,), (0, 0), (0, 24, 0, 8)], ids=str)
def test_groups_without_tokens_are_routed_too(name: str, options: dict, mode: str, sizes: tuple[int, ...]) -> None:
    router, groups = make(name, options, mode), groups_of(*sizes)
    check_well_formed(route(router, *random_tokens(sum(sizes)), groups), router, groups)


@every_mode
@every_arm
def test_routing_twice_gives_the_same_plan(name: str, options: dict, mode: str) -> None:
    router, groups = make(name, options, mode), groups_of(30, 30)
    first, second = (route(router, *random_tokens(60), groups) for _ in range(2))
    assert torch.equal(first.token_index, second.token_index)
    assert torch.equal(first.expert_index, second.expert_index)
    assert torch.equal(first.weight, second.weight)


@every_mode
@every_arm
def test_a_group_does_not_see_another_group(name: str, options: dict, mode: str) -> None:
    router, groups = make(name, options, mode), groups_of(20, 24, 20)
    tokens, ids = random_tokens(64)
    other_tokens, other_ids = random_tokens(64, seed=1)
    mixed_tokens, mixed_ids = tokens.clone(), ids.clone()
    mixed_tokens[20:44], mixed_ids[20:44] = other_tokens[20:44], other_ids[20:44]
    before, after = (
        decisions(route(router, tokens, ids, groups)),
        decisions(route(router, mixed_tokens, mixed_ids, groups)),
    )
    assert before[:20] == after[:20]
    assert before[44:] == after[44:]


@every_mode
@every_arm
def test_groups_routed_together_or_alone_get_the_same_experts(name: str, options: dict, mode: str) -> None:
    router, sizes = make(name, options, mode), (20, 24, 20)
    tokens, ids = random_tokens(64)
    together = route(router, tokens, ids, groups_of(*sizes))
    alone = [
        route(router, part, part_ids, groups_of(len(part)))
        for part, part_ids in zip(tokens.split(sizes), ids.split(sizes), strict=True)
    ]
    assert decisions(together) == [decision for plan in alone for decision in decisions(plan)]
    for loss, value in together.losses.items():
        # The mean over the three groups.
        assert value.item() == pytest.approx(sum(plan.losses[loss].item() for plan in alone) / 3, rel=1e-5)


def tokens_that_hear_the_future(router: Router, seed: int) -> int:
    """Earlier tokens of a group whose experts, gates or drop change when only later tokens of the group change."""
    size, cut = 48, 30
    tokens, ids = random_tokens(size, seed)
    other_tokens, other_ids = random_tokens(size, seed + 1_000)
    if seed % 2:
        # All alike: experts overflow, which is when drops could look ahead.
        other_tokens[cut:] = other_tokens[cut]
    other_tokens[:cut], other_ids[:cut] = tokens[:cut], ids[:cut]
    before = decisions(route(router, tokens, ids, groups_of(size)))
    after = decisions(route(router, other_tokens, other_ids, groups_of(size)))
    return sum(a != b for a, b in zip(before[:cut], after[:cut], strict=True))


@every_arm
def test_what_a_router_declares_about_causality_is_true(name: str, options: dict) -> None:
    router = make(name, options)
    declared = {"training": router.causal, **router.evaluation_modes}
    changed = {"training": sum(tokens_that_hear_the_future(router, seed) for seed in range(6))}
    router.eval()
    for mode in router.evaluation_modes:
        router.evaluation_mode = mode
        changed[mode] = sum(tokens_that_hear_the_future(router, seed) for seed in range(6))
    assert {mode: count == 0 for mode, count in changed.items()} == declared


@every_arm
def test_every_router_parameter_learns_from_the_output(name: str, options: dict) -> None:
    router = make(name, options)
    experts = Experts(num_experts=router.num_experts, width=WIDTH, hidden_width=8)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    layer = SparseLayer(router, experts, routing_group=2)
    tokens, ids = random_tokens(40)
    output, _ = layer(tokens.view(4, 10, WIDTH), ids.view(4, 10))
    (output * torch.randn_like(output)).sum().backward()
    silent = [n for n, p in router.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert silent == []


@every_arm
def test_every_auxiliary_loss_reaches_the_router(name: str, options: dict) -> None:
    router = make(name, options)
    plan = router(*random_tokens(40), groups_of(40))
    finished = {name: finish_step_loss(part, part.demand, 40) for name, part in plan.step_losses.items()}
    losses = {**plan.losses, **finished}
    for loss, value in losses.items():
        gradients = torch.autograd.grad(value, list(router.parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and bool(g.abs().sum() > 0) for g in gradients), loss
    assert set(losses) == set(router.loss_coefficients)


@every_mode
@every_arm
def test_mixed_precision_does_not_change_who_goes_where(name: str, options: dict, mode: str) -> None:
    router, groups = make(name, options, mode), groups_of(40)
    tokens, ids = random_tokens(40)
    plain = route(router, tokens, ids, groups)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = route(router, tokens, ids, groups)
    assert decisions(mixed) == decisions(plain)
    assert mixed.weight.dtype == torch.float32


@every_arm
def test_a_router_is_ready_once_it_is_built(name: str, options: dict) -> None:
    torch.use_deterministic_algorithms(True)  # memory that nobody has written to is NaN
    try:
        assert bool(torch.empty(3).isnan().all())
        router = instantiate(options_of(name, **options), "router", Router, width=WIDTH, vocab_size=VOCABULARY)
        assert all(bool(torch.isfinite(parameter).all()) for parameter in router.parameters())
    finally:
        torch.use_deterministic_algorithms(False)


@every_arm
def test_initial_parameters_depend_on_the_seed_alone(name: str, options: dict) -> None:
    torch.manual_seed(1)
    one = build_router(name, seed=7, **options)
    torch.manual_seed(2)
    same, other = build_router(name, seed=7, **options), build_router(name, seed=8, **options)
    for first, second, third in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)
        # Some papers start a matrix at zero.
        assert not torch.equal(first, third) or not bool(first.any())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in one.parameters())


@pytest.mark.parametrize("name", ROUTERS)
def test_a_group_smaller_than_the_experts_is_refused_by_name(name: str) -> None:
    router = build_router(name)
    router.check_group(router.num_experts)
    with pytest.raises(ValueError, match=rf"router\.num_experts={router.num_experts} .*routing group"):
        router.check_group(router.num_experts - 1)


def test_every_configured_router_is_found() -> None:
    assert {"base", "dense", "switch", "top_k", "uniform"} <= set(ROUTERS)
