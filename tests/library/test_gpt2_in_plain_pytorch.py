"""Sparse layers in a model of transformers, in a training loop without Lightning, Hydra or a configuration."""

import copy
import math
from pathlib import Path

import pytest
import torch
from gpt2_with_experts import VOCABULARY, WIDTH, gpt2_with_experts, plain_gpt2, text
from torch import Tensor, nn

from lightning_base import BASE, Hash, Switch, auxiliary_loss, drop_ins, end_step, read_inputs

MLP, TOP = "transformer.h.1.mlp", "transformer.ln_f.0"


def train(model: nn.Module, steps: int) -> list[float]:
    """The loss of each step, on new text every time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(steps):
        ids = text(seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        (loss + auxiliary_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        end_step(model)
        losses.append(loss.item())
    return losses


def test_training_makes_the_loss_fall_and_every_part_of_the_layers_moves() -> None:
    model = gpt2_with_experts()
    before = copy.deepcopy(model.state_dict())
    losses = train(model.train(), 30)
    # Nothing is known at first: log 64 nats, and a little for random logits.
    assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=0.15)
    assert losses[-1] < losses[0] - 0.8
    after = model.state_dict()
    parts = [name for name in before if name.startswith((MLP, TOP))]
    assert {name.removeprefix(f"{TOP}.") for name in parts if name.startswith(TOP)} == {
        "layer.router.centroids",
        "layer.router.prices",
        *(f"layer.experts.w{i}.{sublayer}" for i in (1, 2) for sublayer in range(3)),
    }
    assert [name for name in parts if torch.equal(before[name], after[name])] == []


def test_base_on_top_is_balanced_in_training_and_greedy_in_evaluation() -> None:
    model = gpt2_with_experts()
    train(model.train(), 3)
    plan = drop_ins(model)[TOP].plan
    assert plan is not None
    # 4 groups of 2 sequences of 24 tokens over 8 experts.
    assert plan.group_load.tolist() == [[6] * 8] * 4
    with torch.no_grad():
        model.eval()(input_ids=text())
    plan = drop_ins(model)[TOP].plan
    assert plan is not None
    assert torch.equal(plan.expert_index, plan.aux["scores"].argmax(1))
    assert not plan.weight.requires_grad


def test_fresh_layers_change_nothing_that_the_model_computes_apart_from_the_mlp_that_is_gone() -> None:
    # Experts start as the identity: a BASE layer on top adds nothing, and a layer without residual gives 0.
    plain, sparse = plain_gpt2().eval(), gpt2_with_experts().eval()
    last = plain.transformer.h[1].mlp.c_proj
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        torch.testing.assert_close(sparse(input_ids=text()).logits, plain(input_ids=text()).logits)


def test_padding_takes_no_slot_and_an_id_goes_where_the_hash_sends_it() -> None:
    model = gpt2_with_experts(Hash(num_experts=4, vocab_size=VOCABULARY)).train()
    read_inputs(model)
    ids = text()
    mask = torch.ones_like(ids)
    mask[1, 20:], mask[5, 3:] = 0, 0
    model(ids, attention_mask=mask)
    real = mask.bool()
    for drop_in in drop_ins(model).values():
        assert drop_in.plan is not None
        assert drop_in.plan.num_tokens == 8 * 24 - 4 - 21
        assert drop_in.plan.groups.sizes == (44, 48, 27, 48)
    plan = drop_ins(model)[MLP].plan
    assert plan is not None
    # Before the frequencies are known the table is round-robin by id.
    assert torch.equal(plan.expert_index, ids[real] % 4)
    # Without a mask all are tokens again.
    model(ids)
    assert drop_ins(model)[TOP].plan.num_tokens == 8 * 24  # type: ignore[union-attr]


def test_a_router_of_token_ids_says_that_nobody_gave_them() -> None:
    model = gpt2_with_experts(Hash(num_experts=4, vocab_size=VOCABULARY))
    with pytest.raises(ValueError, match=r"Hash routes by token ids: .*read_inputs"):
        model(input_ids=text())


def test_generation_with_a_cache_is_generation_without() -> None:
    model = gpt2_with_experts(Hash(num_experts=4, vocab_size=VOCABULARY))
    read_inputs(model)
    train(model.train(), 3)
    model.eval()
    prompt = text(sequences=3, length=6)
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0

    def generate(use_cache: bool) -> Tensor:
        return model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=use_cache)

    cached = generate(True)
    assert cached.shape == (3, 14)
    assert torch.equal(cached, generate(False))


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointed in (False, True):
        model = gpt2_with_experts().train()
        if checkpointed:
            model.activation_checkpointing_enable()
        drop_in = drop_ins(model)[MLP]
        torch.nn.init.normal_(drop_in.layer.experts.w2[0], std=0.3, generator=torch.Generator().manual_seed(0))
        passes: list[int] = []
        drop_in.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        (model(input_ids=text(), labels=text()).loss + auxiliary_loss(model)).backward()
        assert len(passes) == 1 + checkpointed
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_in_the_middle_of_a_step_can_be_copied_and_saved(tmp_path: Path) -> None:
    model = gpt2_with_experts(Switch(num_experts=4, width=WIDTH)).train()
    read_inputs(model)
    loss = model(input_ids=text(), labels=text()).loss
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    (loss + auxiliary_loss(model)).backward()
    for other in (twin, loaded):
        assert drop_ins(other)[MLP].plan is None
        assert other(input_ids=text(), labels=text()).loss.item() == loss.item()
        # The copy reads its own inputs and leaves those of the model alone.
        assert drop_ins(other)[MLP]._token_ids is not drop_ins(model)[MLP]._token_ids
    fresh = gpt2_with_experts(Switch(num_experts=4, width=WIDTH))
    fresh.load_state_dict(model.state_dict())


def test_the_prices_of_base_are_the_mean_over_the_groups_of_all_micro_batches() -> None:
    model = gpt2_with_experts().train()
    drop_in = drop_ins(model)[TOP]
    router = drop_in.layer.router
    assert isinstance(router, BASE)
    seen = []
    for ids in text(12).split([8, 4]):
        model(input_ids=ids)
        assert drop_in.plan is not None
        seen.append(drop_in.plan.aux["group_prices"])
    assert not bool(router.prices.any()), "a forward pass moves no state"
    model.eval()(input_ids=text(2, seed=5))
    end_step(model)
    # 4 groups and then 2; what evaluation routes does not count.
    assert [len(prices) for prices in seen] == [4, 2]
    torch.testing.assert_close(router.prices, torch.cat(seen).mean(0))
