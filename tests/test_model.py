"""The transformer around the sparse layers. B sequences, L positions, D width, V vocabulary."""

import copy
import math

import forks
import pytest
import torch
from router_arms import ROUTERS, build_router
from torch import Tensor

from lightning_base.model import (
    Transformer,
    document_mask,
    initialize,
    rotate,
    shared_parameters,
    sparse_positions,
    weights_fingerprint,
)
from lightning_base.moe import SparseLayer
from lightning_base.routing import Router

V, L, D = 40, 12, 32
every_router = pytest.mark.parametrize("name", ROUTERS)


def build(name: str = "dense", *, seed: int = 0, router_options: dict | None = None, **options: object) -> Transformer:
    def make_router() -> Router:
        return build_router(name, width=D, **(router_options or {}))

    defaults = {"vocab_size": V, "sequence_length": L, "width": D, "depth": 2, "heads": 4, "ffn_width": 64}
    model = Transformer(**{**defaults, "routing_group": 2, "make_router": make_router, **options})
    initialize(model, seed)
    return model


def awake(model: Transformer) -> Transformer:
    """The same model with no weight at zero, so that every part has a say in the logits."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def some_ids(sequences: int = 4, length: int = L, seed: int = 0) -> Tensor:
    return torch.randint(0, V, (sequences, length), generator=torch.Generator().manual_seed(seed))


# Initial weights


@pytest.mark.parametrize("placement", ["replace", "insert"])
def test_all_routers_share_the_same_initial_weights(placement: str) -> None:
    shared = [dict(shared_parameters(build(name, placement=placement))) for name in ROUTERS]
    for other in shared[1:]:
        assert other.keys() == shared[0].keys()
        assert all(torch.equal(other[key], shared[0][key]) for key in other)
    assert len({weights_fingerprint(iter(parameters.items())) for parameters in shared}) == 1


def test_another_seed_gives_other_weights_and_another_fingerprint() -> None:
    one, same, other = (build("switch", seed=seed) for seed in (0, 0, 1))
    fingerprints = [weights_fingerprint(shared_parameters(model)) for model in (one, same, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


def test_one_changed_weight_changes_the_fingerprint() -> None:
    model = build("switch")
    before = weights_fingerprint(shared_parameters(model))
    with torch.no_grad():
        model.norm.weight[0] += 1e-6
    assert weights_fingerprint(shared_parameters(model)) != before


class Thirsty(Router):
    """A test double that draws many numbers of its own, in a module of its own."""

    def __init__(self) -> None:
        super().__init__(num_experts=8)
        self.extra = torch.nn.Linear(100, 100)
        torch.randn(1_000)


def test_a_router_with_more_parameters_shifts_no_other_weight() -> None:
    lean, thirsty = build("uniform"), build(make_router=Thirsty)
    for key, parameter in lean.named_parameters():
        assert torch.equal(parameter, thirsty.get_parameter(key)), key


@every_router
def test_initialisation_draws_every_parameter_and_leaves_the_global_generator_alone(name: str) -> None:
    model = build(name, positions="learned", sublayers=2)
    expected = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    before = torch.random.get_rng_state()
    initialize(model, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[key]), key


def test_layers_start_different_from_each_other() -> None:
    model = build("switch", depth=4)
    one, other = model.sparse_layers.values()
    assert not torch.equal(one.experts.w1[0], other.experts.w1[0])
    assert not torch.equal(one.router.get_parameter("gate.weight"), other.router.get_parameter("gate.weight"))


def test_the_number_of_experts_does_not_change_the_first_expert() -> None:
    # The dense arm is the first expert of the sparse ones.
    (dense,) = build("dense", sublayers=2).sparse_layers.values()
    (switch,) = build("switch", sublayers=2).sparse_layers.values()
    for one, eight in zip(dense.experts.w1, switch.experts.w1, strict=True):
        assert torch.equal(one[0], eight[0])


def normalised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


@every_router
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_fresh_model_only_embeds_norms_and_projects_back(name: str, positions: str) -> None:
    # Every matrix that writes into the residual stream starts at zero.
    model, ids = build(name, positions=positions), some_ids()
    hidden = model.embedding.weight[ids]
    if positions == "learned":
        assert model.position is not None
        hidden = hidden + model.position.weight[:L]
    torch.testing.assert_close(model(ids).logits, normalised(hidden) @ model.embedding.weight.T, atol=1e-6, rtol=1e-5)


# Placement


def names(model: Transformer) -> list[str]:
    """The blocks in order, a star behind those whose feed-forward is sparse."""
    return [name + "*" * isinstance(block.feed_forward, SparseLayer) for name, block in model.blocks.items()]


@pytest.mark.parametrize(
    ("placement", "layers", "blocks"),
    [
        ("replace", "every_other", "layer_0 layer_1* layer_2 layer_3*"),
        ("replace", [0, 3], "layer_0* layer_1 layer_2 layer_3*"),
        # ((i + 1) 4) // (n + 1): one layer at 4 // 2 = 2, two at 4 // 3 = 1 and 8 // 3 = 2.
        ("replace", 1, "layer_0 layer_1 layer_2* layer_3"),
        ("replace", 2, "layer_0 layer_1* layer_2* layer_3"),
        ("replace", 4, "layer_0* layer_1* layer_2* layer_3*"),
        ("insert", 1, "layer_0 layer_1 sparse_2* layer_2 layer_3"),
        ("insert", 2, "layer_0 sparse_1* layer_1 sparse_2* layer_2 layer_3"),
        ("insert", [0, 4], "sparse_0* layer_0 layer_1 layer_2 layer_3 sparse_4*"),
        ("insert", "every_other", "layer_0 sparse_1* layer_1 layer_2 sparse_3* layer_3"),
    ],
)
def test_sparse_layers_are_where_the_configuration_says(placement: str, layers: object, blocks: str) -> None:
    model = build("switch", depth=4, placement=placement, sparse_layers=layers)
    assert names(model) == blocks.split()
    assert list(model.sparse_layers) == [name.rstrip("*") for name in blocks.split() if name.endswith("*")]
    assert list(model(some_ids()).plans) == list(model.sparse_layers)
    for name, block in model.blocks.items():
        assert (block.attention is None) == name.startswith("sparse_")


def test_the_paper_layer_goes_into_the_middle_of_24() -> None:
    # One layer after layer 12; three at 24 / 4 * (1, 2, 3).
    assert sparse_positions(1, 24, "insert") == [12]
    assert sparse_positions(3, 24, "insert") == [6, 12, 18]


def test_a_single_block_can_be_sparse() -> None:
    assert sparse_positions("every_other", 1, "replace") == [0]
    assert sparse_positions(1, 1, "replace") == [0]


@pytest.mark.parametrize(
    ("layers", "placement", "message"),
    [
        (0, "replace", r"model\.sparse_layers=0: between 1 and model\.depth=4"),
        (5, "insert", r"model\.sparse_layers=5: between 1 and model\.depth=4"),
        ([], "replace", r"model\.sparse_layers=\[\]: give different positions between 0 and 3"),
        ([4], "replace", r"model\.sparse_layers=\[4\]: give different positions between 0 and 3"),
        ([5], "insert", r"model\.sparse_layers=\[5\]: give different positions between 0 and 4"),
        ([1, 1], "insert", r"model\.sparse_layers=\[1, 1\]: give different positions"),
        ([-1], "replace", r"model\.sparse_layers=\[-1\]: give different positions"),
    ],
)
def test_a_placement_that_does_not_exist_is_refused(layers: object, placement: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("switch", depth=4, placement=placement, sparse_layers=layers)


# Cost


def active_matmul_parameters(model: Transformer, ids: Tensor) -> float:
    """Entries of expert matrices that a token meets, on average over tokens: half its multiply-adds per FLOP."""
    total = 0
    for name, plan in model(ids).plans.items():
        experts = model.sparse_layers[name].experts
        per_expert = sum(w[0].numel() for w in [*experts.w1, *experts.w2])
        total += len(plan.token_index) * per_expert
    return total / ids.numel()


def test_two_experts_of_half_the_width_cost_as_much_as_one() -> None:
    arms = {
        "dense": build("dense"),
        "base": build("base"),
        "switch": build("switch", router_options={"capacity_factor": None}),
        "top_k": build("top_k"),
    }
    cost = {name: active_matmul_parameters(model, some_ids()) for name, model in arms.items()}
    # One layer of 32 -> 64 -> 32: 2 * 32 * 64.
    assert cost == dict.fromkeys(arms, 4096.0)
    assert active_matmul_parameters(build("top_k", split_width=False), some_ids()) == 2 * 4096.0


def test_total_parameters_of_the_softmax_arms() -> None:
    def sparse(name: str) -> int:
        (layer,) = build(name).sparse_layers.values()
        return sum(p.numel() for p in layer.parameters())

    gate = 8 * D
    assert sparse("switch") == sparse("base") == 8 * 4096 + gate
    assert sparse("top_k") == 8 * 2048 + gate
    assert sparse("dense") == 4096


def test_a_width_that_k_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.ffn_width=64 is not divisible by router\.top_k=3.*split_width=false"):
        build("top_k", router_options={"top_k": 3})


# Attention and positions


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    queries, keys = (rotate(x.expand(1, 1, 20, 8))[0, 0] for x in (query, key))
    scores = queries @ keys.T
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    assert scores[0].std() > 0.1


def test_rotary_turns_each_pair_by_its_angle() -> None:
    # A head of 4: the pair (0, 2) turns by one radian per position, the pair (1, 3) by 10,000 ** -0.5 = 0.01.
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 3, 4)
    expected = [[math.cos(p), math.cos(0.01 * p), math.sin(p), math.sin(0.01 * p)] for p in range(3)]
    torch.testing.assert_close(rotate(x)[0, 0], torch.tensor(expected))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_order_of_earlier_tokens_matters(positions: str) -> None:
    model, ids = awake(build(depth=1, positions=positions)).eval(), some_ids(1)
    swapped = ids.clone()
    ids[0, :2], swapped[0, :2] = torch.tensor([3, 4]), torch.tensor([4, 3])
    assert not torch.allclose(model(ids).logits[0, -1], model(swapped).logits[0, -1], atol=1e-4)


def test_learned_positions_tell_places_apart_in_a_constant_text() -> None:
    ids = torch.full((1, L), 7)
    learned, rotary = (awake(build(positions=p)).eval()(ids).logits[0] for p in ("learned", "rotary"))
    # With equal values everywhere attention mixes to the same value, wherever it looks.
    torch.testing.assert_close(rotary, rotary[:1].expand_as(rotary), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(learned[0], learned[1], atol=1e-3)


def test_the_document_mask_looks_back_within_a_document() -> None:
    mask = document_mask(torch.tensor([[5, 5, 6, 6]]))
    assert mask.tolist() == [
        [
            [
                [True, False, False, False],
                [True, True, False, False],
                [False, False, True, False],
                [False, False, True, True],
            ]
        ]
    ]


def test_a_document_reads_as_if_it_stood_alone() -> None:
    # Rotary positions are relative, so that a later document is not even shifted.
    model, ids = awake(build()).eval(), some_ids(1)
    document = torch.tensor([[0] * 5 + [1] * 7])
    together = model(ids, document=document).logits
    torch.testing.assert_close(together[:, :5], model(ids[:, :5]).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[:, 5:], model(ids[:, 5:]).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(ids).logits[:, 5:], together[:, 5:], atol=1e-2)


@every_router
def test_later_tokens_do_not_reach_earlier_logits_in_evaluation(name: str) -> None:
    changed = 0.0
    model = awake(build(name, depth=4, routing_group=1)).eval()
    for seed in range(4):
        ids, other = some_ids(2, seed=seed), some_ids(2, seed=seed + 100)
        other[:, :8] = ids[:, :8]
        before, after = (model(x).logits[:, :8] for x in (ids, other))
        changed = max(changed, (before - after).abs().max().item())
    causal = all(layer.router.causal_in_evaluation for layer in model.sparse_layers.values())
    assert (changed < 1e-4) == causal


def test_balanced_evaluation_of_base_does_leak() -> None:
    # The same check as above sees a leak where there is one.
    model = awake(build("base", depth=4, routing_group=1)).eval()
    for layer in model.sparse_layers.values():
        layer.router.evaluation_mode = "balanced"
    ids, other = some_ids(2), some_ids(2, seed=100)
    other[:, :8] = ids[:, :8]
    assert (model(ids).logits[:, :8] - model(other).logits[:, :8]).abs().max().item() > 1e-2


@every_router
def test_padding_at_the_end_changes_no_logit_before_it(name: str) -> None:
    model, ids = awake(build(name)).train(), some_ids()
    valid = torch.arange(L) < torch.tensor([12, 7, 3, 12])[:, None]
    other = torch.where(valid, ids, (ids + 1) % V)
    before, after = model(ids, valid=valid), model(other, valid=valid)
    assert torch.equal(before.logits[valid], after.logits[valid])
    assert all(plan.num_tokens == 12 + 7 + 3 + 12 for plan in before.plans.values())


# Activation checkpointing and compilation


@every_router
def test_activation_checkpointing_changes_neither_loss_nor_gradient_nor_plan(name: str) -> None:
    found = []
    for checkpointed in (False, True):
        model = awake(build(name, depth=4, checkpoint_activations=checkpointed)).train()
        ids = some_ids()
        output = model(ids)
        loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), ids.roll(-1, 1).flatten())
        for plan in output.plans.values():
            loss = loss + 0.01 * sum(plan.losses.values())
        loss.backward()
        found.append((loss.item(), {k: p.grad for k, p in model.named_parameters()}, output.plans))
    (loss, gradients, plans), (other_loss, other_gradients, other_plans) = found
    assert loss == other_loss
    for key, gradient in gradients.items():
        assert gradient is not None, key
        assert torch.equal(gradient, other_gradients[key]), key
    for key, plan in plans.items():
        assert torch.equal(plan.token_index, other_plans[key].token_index)
        assert torch.equal(plan.expert_index, other_plans[key].expert_index)
        assert torch.equal(plan.weight, other_plans[key].weight)


def compare_compiled(backend: str, *names: str) -> None:
    """Raises unless the compiled model answers like the plain one."""
    torch.set_num_threads(1)
    for name in names:
        torch._dynamo.reset()
        model = awake(build(name)).train()
        compiled = torch.compile(copy.deepcopy(model), backend=backend)
        # The drops of the second batch give its tensors another size.
        for ids in (some_ids(), some_ids(seed=1)):
            expected, got = model(ids), compiled(ids)
            torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)
            for key, plan in expected.plans.items():
                assert torch.equal(got.plans[key].expert_index, plan.expert_index)
            expected.logits.square().mean().backward()
            got.logits.square().mean().backward()
        for parameter, twin in zip(model.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(twin.grad, parameter.grad, atol=1e-4, rtol=1e-3)
        assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"


# Inductor would spend most of a minute on generating code that has nothing to do with this project.
@pytest.mark.parametrize(
    ("backend", "names"),
    [
        ("eager", ["base"]),
        pytest.param("eager", ["base", "switch"], marks=pytest.mark.exhaustive),
        pytest.param("aot_eager", ["base", "switch"], marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_a_compiled_model_gives_the_same_logits_plans_and_gradients(backend: str, names: list[str]) -> None:
    # In a process of its own: the compiler cannot trace the shape checks that are on in this one.
    forks.call(compare_compiled, backend, *names)


@pytest.mark.parametrize("precision", ["mixed", "true"])
@every_router
def test_bfloat16_stays_near_float32(name: str, precision: str) -> None:
    model, ids = awake(build(name, depth=4, positions="learned")).train(), some_ids()
    expected = model(ids)
    if precision == "mixed":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(ids)
    else:
        model.bfloat16()
        got = model(ids)
    got.logits.float().square().mean().backward()
    assert got.logits.dtype == torch.bfloat16
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    # Scores near a tie may change hands, so that a few tokens differ altogether: compare the middle one.
    error = (got.logits.float() - expected.logits).abs().median() / expected.logits.abs().median()
    assert error.item() < 0.1
