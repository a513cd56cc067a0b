"""Models of transformers with sparse layers against the same models as transformers has them.

B sequences, L positions, E experts.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from huggingface.tiny_models import (
    GROUP,
    LENGTH,
    SEQUENCES,
    SIZES,
    VOCABULARY,
    WIDTH,
    by_hand,
    options,
    some_ids,
    sparse,
)
from torch import nn

from lightning_base.instantiation import ConfigError
from lightning_base.model import shared_parameters, weights_fingerprint
from lightning_base.module import LanguageModel
from lightning_base.routing import BASE, Dense, GShard, Hash, Router, Switch, TopK, Uniform

KINDS = ("gpt2", "llama", "qwen2")
FEED_FORWARD = {"gpt2": "transformer.h.1.mlp", "llama": "model.layers.1.mlp", "qwen2": "model.layers.1.mlp"}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind as save_pretrained leaves it, with weights that are far from any drawn ones."""
    found = {}
    for kind in KINDS:
        model, found[kind] = by_hand(kind, seed=17), tmp_path_factory.mktemp(kind)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(found[kind])
    return found


def of_folder(kind: str, folder: Path) -> nn.Module:
    return type(by_hand(kind)).from_pretrained(folder)


# The dense arm


@every_kind
def test_the_drawn_dense_arm_is_the_model_that_transformers_draws(kind: str) -> None:
    ids = some_ids()
    assert torch.equal(sparse(kind)(ids).logits, by_hand(kind)(ids).logits)
    assert not torch.equal(sparse(kind, seed=4)(ids).logits, by_hand(kind)(ids).logits)


@every_kind
def test_a_folder_gives_its_own_weights_and_its_file_alone_draws(kind: str, folders: dict[str, Path]) -> None:
    ids, folder = some_ids(), folders[kind]
    theirs = of_folder(kind, folder)(ids).logits
    assert torch.equal(sparse(str(folder))(ids).logits, theirs)
    assert torch.equal(sparse(str(folder / "config.json"))(ids).logits, by_hand(kind)(ids).logits)
    assert not torch.allclose(theirs, by_hand(kind)(ids).logits, atol=0.1)


@every_kind
def test_gradients_of_the_dense_arm_are_those_of_the_plain_model(kind: str) -> None:
    ids, found = some_ids(), []
    for model in (by_hand(kind), sparse(kind)):
        model(ids).logits.square().sum().backward()
        found.append({name.removeprefix("network."): p.grad for name, p in model.named_parameters()})
    plain, ours = found
    for name in plain.keys() & ours.keys():
        torch.testing.assert_close(ours[name], plain[name], atol=1e-5, rtol=1e-4)
    # Matrices of experts are [in, out], as GPT-2 has them.
    within = f"{FEED_FORWARD[kind]}."
    for name in plain.keys() - ours.keys():
        theirs = plain[name] if kind == "gpt2" else plain[name].T
        mine = ours[f"{within}layer.experts.network.{name.removeprefix(within)}"]
        torch.testing.assert_close(mine[0], theirs, atol=1e-5, rtol=1e-4)
    assert sum(name.startswith(within) for name in plain.keys() - ours.keys()) == len(plain.keys() - ours.keys()) > 0


# Initial weights


ARMS: dict[str, Callable[[], Router]] = {
    "dense": Dense,
    "base": lambda: BASE(num_experts=4, width=WIDTH),
    "switch": lambda: Switch(num_experts=4, width=WIDTH),
    "top_k": lambda: TopK(num_experts=8, width=WIDTH),
    "hash": lambda: Hash(num_experts=4, vocab_size=VOCABULARY, variant="random"),
}


def test_arms_share_all_weights_outside_of_the_sparse_layers() -> None:
    models = {name: sparse("gpt2", make) for name, make in ARMS.items()}
    assert len({weights_fingerprint(shared_parameters(model)) for model in models.values()}) == 1
    assert weights_fingerprint(shared_parameters(models["base"])) != weights_fingerprint(
        shared_parameters(sparse("gpt2", ARMS["base"], seed=4))
    )
    # The gate of a router and the experts depend on the router's kind alone in their number.
    first = [
        next(iter(models[name].sparse_layers.values())).experts.network.c_fc.weight[:4] for name in ("base", "switch")
    ]
    assert torch.equal(*first)


def test_drawn_experts_differ_and_are_drawn_as_the_architecture_draws() -> None:
    (layer,) = sparse("gpt2", lambda: Uniform(num_experts=32)).sparse_layers.values()
    into, back = layer.experts.network.c_fc, layer.experts.network.c_proj
    plain = by_hand("gpt2").transformer.h[1].mlp
    assert torch.equal(into.weight[0], plain.c_fc.weight)
    assert torch.equal(back.weight[0], plain.c_proj.weight)
    assert len(set(into.weight[:, 0, 0].tolist())) == 32
    # GPT-2 draws N(0, 0.02^2), and what writes into the residual stream narrower by the root of its 2 x 2 sublayers.
    for linear, std in ((into, 0.02), (back, 0.02 / math.sqrt(4))):
        found = linear.weight[1:].detach().std()
        assert float(found) == pytest.approx(std, rel=0.02)
        assert not linear.bias.any()


@every_kind
def test_experts_of_two_are_half_as_wide_and_cost_as_much(kind: str) -> None:
    sizes = {}
    for name in ("dense", "top_k"):
        (layer,) = sparse(kind, ARMS[name]).sparse_layers.values()
        sizes[name] = sum(p[0].numel() for p in layer.experts.parameters() if p.ndim == 3) * layer.router.top_k
        assert layer.experts.hidden_width == 64 // layer.router.top_k
    assert sizes["dense"] == sizes["top_k"] == (2 if kind == "gpt2" else 3) * WIDTH * 64


# Upcycling

UNIT_GATES: dict[str, Callable[[], Router]] = {
    "base": lambda: BASE(num_experts=4, width=WIDTH, gate="one"),
    "switch": lambda: Switch(
        num_experts=4, width=WIDTH, gate="one", capacity_factor=None, evaluation_capacity_factor=None
    ),
    "top_k": lambda: TopK(num_experts=4, width=WIDTH, top_k=3),
    "uniform": lambda: Uniform(num_experts=4),
}


@every_kind
@pytest.mark.parametrize("name", UNIT_GATES)
def test_copies_under_a_gate_of_one_give_the_dense_model(kind: str, name: str, folders: dict[str, Path]) -> None:
    ids = some_ids()
    expected = of_folder(kind, folders[kind]).double()(ids).logits
    model = sparse(str(folders[kind]), UNIT_GATES[name], split_width=False).double()
    for training in (True, False):
        logits = model.train(training)(ids).logits
        torch.testing.assert_close(logits, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_shuffle_deals_tokens_to_other_groups_and_gives_them_back(kind: str, folders: dict[str, Path]) -> None:
    options = {"upcycle": True, "split_width": False, "shuffle_tokens": True}
    model, ids = sparse(str(folders[kind]), lambda: TopK(num_experts=4, width=WIDTH), **options).train(), some_ids()
    (layer,) = model.sparse_layers.values()
    ahead = model(ids)
    layer.shuffle.begin(step=0, micro_batch=0)
    shuffled = model(ids)
    # The same copies of one layer with gates that sum to 1: a token that came back elsewhere would show.
    torch.testing.assert_close(shuffled.logits, of_folder(kind, folders[kind])(input_ids=ids).logits)
    one, other = (next(iter(found.plans.values())) for found in (ahead, shuffled))
    assert torch.equal(one.demand, other.demand)
    assert not torch.equal(one.group_demand, other.group_demand)


def test_a_gate_below_one_or_drawn_experts_do_not() -> None:
    ids = some_ids()
    expected = by_hand("llama")(ids).logits
    for make, upcycle in ((ARMS["switch"], True), (UNIT_GATES["uniform"], False)):
        logits = sparse("llama", make, upcycle=upcycle)(ids).logits
        assert (logits - expected).abs().max() > 1e-4
    copies = sparse("llama", UNIT_GATES["uniform"], upcycle=True)(ids).logits
    torch.testing.assert_close(copies, expected, atol=1e-6, rtol=0)


# Documents, padding, recomputation


def test_a_document_reads_as_if_it_stood_alone() -> None:
    model, ids = sparse("llama").eval(), some_ids()
    document = (torch.arange(LENGTH) >= 5).long().expand(SEQUENCES, -1)
    together = model(ids, document=document).logits
    torch.testing.assert_close(together[:, 5:], model(ids[:, 5:]).logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(ids).logits[:, 5:], together[:, 5:], atol=1e-3)


def test_padding_is_not_routed_and_changes_nothing_before_it() -> None:
    model, ids = sparse("gpt2", ARMS["base"]), some_ids()
    valid = torch.arange(LENGTH) < torch.tensor([12, 7, 3, 12])[:, None]
    other = torch.where(valid, ids, (ids + 1) % VOCABULARY)
    before, after = model(ids, valid), model(other, valid)
    assert torch.equal(before.logits[valid], after.logits[valid])
    assert before.plans[FEED_FORWARD["gpt2"]].groups.sizes == (19, 15)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_recomputation_changes_nothing_even_after_a_pass_without_gradient(kind: str) -> None:
    # GShard's second expert is drawn from the text: what is computed again has to see the same text.
    found = []
    for again in (False, True):
        model = sparse(kind, lambda: GShard(num_experts=4, width=WIDTH), checkpoint_activations=again)
        output = model(some_ids())
        with torch.no_grad():
            model(some_ids(seed=1))
        (plan,) = output.plans.values()
        (output.logits.square().sum() + sum(plan.losses.values())).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)
        assert gradient is not None


def compare_compiled() -> None:
    """Raises unless a compiled model gives the same as the plain one."""
    found = []
    for compiled in (False, True):
        model = sparse("qwen2", ARMS["top_k"])
        output = (torch.compile(model, backend="eager") if compiled else model)(some_ids())
        output.logits.square().sum().backward()
        found.append((output.logits, {name: p.grad for name, p in model.named_parameters()}))
    (logits, gradients), (others, other_gradients) = found
    torch.testing.assert_close(others, logits, atol=1e-6, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"


@pytest.mark.exhaustive
def test_a_compiled_model_gives_the_same_logits_and_gradients() -> None:
    forks.call(compare_compiled)  # the compiler cannot trace the shape checks that are on in this process


# Patterns


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("every_other", ["model.layers.1.mlp"]),
        ("model.layers.*.mlp", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("*mlp*", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        (["model.layers.[1]*.mlp", "*.0.mlp"], ["model.layers.0.mlp", "model.layers.1.mlp"]),
    ],
)
def test_a_pattern_names_the_outermost_modules(layers: object, names: list[str]) -> None:
    model = sparse("llama", ARMS["switch"], layers=layers)
    assert list(model.sparse_layers) == list(model(some_ids()).plans) == names
    assert [layer.router.layer for layer in model.sparse_layers.values()] == names
    assert set(names) < set(model.stages)
    assert list(model.blocks) == ["model.layers.0", "model.layers.1"]
    assert all(layer.routing_group == GROUP for layer in model.sparse_layers.values())


GPT2 = {"model_type": "gpt2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CASES: dict[str, tuple[dict, str]] = {
    "layers that are not there": (
        {"config": GPT2, "layers": "model.layers.*.mlp"},
        r"model\.layers=model\.layers\.\*\.mlp names no module of GPT2LMHeadModel.*transformer\.h\.0\.mlp",
    ),
    "one of two patterns": ({"config": LLAMA, "layers": ["*.mlp", "*.ffn"]}, r"model\.layers=\*\.ffn names no module"),
    "attention": (
        {"config": GPT2, "layers": "transformer.h.1.attn"},
        r"GPT2Attention, which mixes tokens by attention",
    ),
    "a block": ({"config": GPT2, "layers": "transformer.h.1"}, r"GPT2Block, which mixes tokens by attention"),
    "a norm": ({"config": GPT2, "layers": "transformer.ln_f"}, r"LayerNorm, which has no linear layer"),
    "the head": ({"config": GPT2, "layers": "lm_head"}, r"Linear, which does not give hidden states of model width 32"),
    "no architecture": ({"config": {"hidden_size": 32}}, r"model\.config has no model_type"),
    "an unknown architecture": (
        {"config": {"model_type": "gtp2"}},
        r"model_type is gtp2, no causal.*did you mean gpt2",
    ),
    "an unknown option": ({"config": {**GPT2, "n_layers": 3}}, r"model\.config\.n_layers is not an option.*n_layer"),
    "an option of another type": ({"config": {**GPT2, "n_inner": "two"}}, r"model\.config cannot be used: .*n_inner"),
    "heads that do not divide": (
        {"config": {**GPT2, "num_attention_heads": 5}},
        r"model\.config cannot be .*divisible",
    ),
    "one option twice": (
        {"config": {**GPT2, "n_head": 4}},
        r"n_head and model\.config\.num_attention_heads are the same",
    ),
    "dropout": ({"config": {**GPT2, "attn_pdrop": 0.1}}, r"model\.config\.attn_pdrop=0\.1: dropout would differ"),
    "a small vocabulary": ({"config": {**GPT2, "vocab_size": 50}}, r"data\.vocab_size=100 exceeds.*model\.config, 50"),
    "few positions": ({"config": {**GPT2, "n_positions": 8}}, r"data\.sequence_length=12 exceeds the 8 positions"),
    "a folder that is not there": ({"config": "/nowhere"}, r"model\.config=/nowhere does not exist: give a folder"),
    "a folder of something else": ({"config": str(Path(__file__).parent)}, r"has no config\.json"),
    "a file of something else": ({"config": __file__}, r"test_models\.py cannot be read"),
    "several parts": ({"config": {"model_type": "gemma3"}}, r"gemma3 has no hidden_size of its own.*gemma3_text"),
    "layers without a mask": (
        {"config": {"model_type": "lfm2", **SIZES, "layer_types": ["conv", "full_attention"]}},
        r"attend_across_documents=false with layers of model\.config that take no mask \(conv\): set it to true",
    ),
    "an unknown key": ({"config": GPT2, "layer": "x"}, r"model\.layer is not an option of HuggingFaceConfig.*layers"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_built_gets_one_sentence(case: str) -> None:
    given, sentence = CASES[case]
    with pytest.raises(ConfigError, match=sentence) as raised:
        sparse(**given)
    assert "\n" not in str(raised.value)


def test_an_encoder_becomes_causal() -> None:
    ids = some_ids()
    later = ids.clone()
    later[:, -1] = (later[:, -1] + 1) % VOCABULARY
    with torch.no_grad():
        model = sparse({"model_type": "bert", **SIZES}, layers="cls.predictions.transform").eval()
        torch.testing.assert_close(model(ids).logits[:, :-1], model(later).logits[:, :-1])


def test_what_only_construction_gives_is_there_in_narrower_experts() -> None:
    # Parameters of this activation are none that transformers draws.
    model = sparse({"model_type": "apertus", **SIZES}, ARMS["top_k"])
    found = [p for name, p in model.named_parameters() if "act_fn" in name]
    assert found
    assert all(torch.equal(p, p[:1].expand_as(p)) for p in found if p.ndim and len(p) == 8)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_copies_of_experts_that_are_narrower_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.split_width=true with router\.top_k=2.*split_width=false"):
        sparse(str(folders["gpt2"]), ARMS["top_k"])
    with pytest.raises(ConfigError, match=r"n_inner=64, which cannot be split over router\.top_k=3"):
        sparse("gpt2", lambda: TopK(num_experts=4, width=WIDTH, top_k=3))
    with pytest.raises(ConfigError, match=r"model\.upcycle=false with the weights in"):
        options(str(folders["gpt2"]), upcycle=False)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin, which is code"):
        options(str(tmp_path))


def test_weights_that_do_not_fit_their_configuration_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    deeper = by_hand("gpt2", n_layer=3)
    deeper.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(folders["gpt2"] / "model.safetensors")
    with pytest.raises(ConfigError, match=r"do not fit its config\.json \(missing_keys: transformer\.h\.2"):
        sparse(str(tmp_path))


def test_weights_that_cannot_be_loaded_are_found_before_anything_starts(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def check(folder: Path, **given: Any) -> None:
        found = options(str(folder), **given)
        found.check(Switch(num_experts=4, width=WIDTH), vocab_size=8, sequence_length=8, within_documents=False)

    check(folders["gpt2"])
    with pytest.raises(ConfigError, match=r"model\.layers=\[\] makes no layer sparse"):
        check(folders["gpt2"], layers=[])
    by_hand("gpt2", n_inner=24).config.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((folders["gpt2"] / "model.safetensors").read_bytes())
    shape = r"h\.0\.mlp\.c_fc\.bias in model\.safetensors is of the shape \[64\], and \[24\] by config\.json"
    with pytest.raises(ConfigError, match=shape):
        check(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        check(tmp_path)


def test_matrices_of_experts_decay_and_their_biases_do_not() -> None:
    module = LanguageModel(
        router={"_target_": "lightning_base.routing.uniform.Uniform", "num_experts": 4},
        model={"library": "transformers", "config": {"model_type": "gpt2", **SIZES}},
        optimizer={
            "learning_rate": 1e-3,
            "router_learning_rate_factor": 1.0,
            "weight_decay": 0.5,
            "betas": [0.9, 0.95],
            "warmup_steps": 0,
            "final_learning_rate": 0.0,
            "schedule": "constant",
        },
        max_steps=1,
        vocab_size=VOCABULARY,
        sequence_length=LENGTH,
        routing_group=GROUP,
        seed=0,
    )
    decayed, kept, _ = module.configure_optimizers()["optimizer"].param_groups
    names = {parameter: name for name, parameter in module.named_parameters()}
    assert all(".c_" in names[p] and names[p].endswith("weight") for p in decayed["params"])
    # Four matrices of the dense block; two of attention and two of all experts in the sparse one.
    assert len(decayed["params"]) == 8
    spared = [names[p] for p in kept["params"]]
    assert sum(".experts." in name and name.endswith("bias") for name in spared) == 2
    assert any("wte" in name for name in spared)


def test_the_token_that_a_file_calls_padding_learns_too(folders: dict[str, Path], tmp_path: Path) -> None:
    values = json.loads((folders["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "pad_token_id": 5}))
    model = sparse(str(tmp_path / "config.json"))
    model(torch.full((GROUP, LENGTH), 5)).logits.square().sum().backward()
    assert model.network.get_input_embeddings().weight.grad[5].abs().max() > 0
