"""Tokens dealt out to routing groups of other sequences, and put back; in one process and between two.

Shapes: B sequences, L positions, D width, T tokens.
"""

import re
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from router_arms import ROUTERS, VOCABULARY, WIDTH, build_router, random_tokens
from tiny_training import leave

from lightning_base.moe.exchange import Exchange
from lightning_base.moe.experts import Experts
from lightning_base.moe.layer import SparseLayer
from lightning_base.moe.shuffle import Deal, Shuffle, check_shuffle
from lightning_base.routing.noise import permutation
from lightning_base.routing.plan import RoutingGroups

GROUP = 2
# Tokens of each of eight sequences: without padding, with some, and with a rank that holds none.
LENGTHS = {"whole": [5] * 8, "padded": [5, 1, 0, 3, 4, 5, 2, 2], "one rank empty": [3, 5, 2, 4, 0, 0, 0, 0]}


def groups_of(lengths: list[int]) -> RoutingGroups:
    sizes = [sum(lengths[i : i + GROUP]) for i in range(0, len(lengths), GROUP)]
    return RoutingGroups(tuple(sizes), tuple(lengths))


def dealt(shuffle: Shuffle, lengths: list[int]) -> Deal:
    deal = shuffle.deal(groups_of(lengths))
    assert deal is not None
    return deal


def a_shuffle(among: int | None = None, *, step: int = 3, micro_batch: int = 0, key: int = 7) -> Shuffle:
    shuffle = Shuffle(GROUP, among)
    shuffle.key = key
    shuffle.begin(step, micro_batch)
    return shuffle


def order_of(shuffle: Shuffle, lengths: list[int]) -> list[int]:
    """Which token stands in each place."""
    return dealt(shuffle, lengths).shuffle(torch.arange(sum(lengths))).tolist()


def hashed(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 in unsigned arithmetic, from its paper."""
    x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def test_the_permutation_is_that_of_sorted_hashes() -> None:
    with np.errstate(over="ignore"):
        key, step, part = hashed(np.array([7, 3 + 1, 2 + 1]))
        seed = key + np.uint64(3) * step + np.uint64(5) * part
        expected = np.argsort(hashed(hashed(np.arange(1000)) + seed).astype(np.int64), kind="stable")
    assert permutation(1000, key=7, step=3, part=2).tolist() == expected.tolist()
    assert sorted(expected.tolist()) == list(range(1000))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("among", [None, 4, 2])
def test_every_token_comes_back_to_its_place(lengths: list[int], among: int | None) -> None:
    deal = dealt(a_shuffle(among), lengths)
    tokens_TD = torch.randn(sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    shuffled_TD = deal.shuffle(tokens_TD)
    assert torch.equal(deal.unshuffle(shuffled_TD), tokens_TD)
    weight_TD = torch.randn_like(tokens_TD)
    (deal.unshuffle(shuffled_TD * 2) * weight_TD).sum().backward()
    assert torch.equal(tokens_TD.grad, 2 * weight_TD)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_groups_keep_their_sizes_and_the_order_of_the_step(lengths: list[int]) -> None:
    order = order_of(a_shuffle(), lengths)
    assert sorted(order) == list(range(sum(lengths)))
    for group in groups_of(lengths).split(torch.tensor(order)):
        assert group.tolist() == sorted(group.tolist())


def test_a_group_holds_tokens_of_many_sequences() -> None:
    order = torch.tensor(order_of(a_shuffle(), [100] * 8))
    held = torch.bincount(order[:200] // 100, minlength=8)
    # 200 of 800 tokens without replacement, 100 of each sequence: 25 of each, standard deviation 4.1.
    assert 25 - 5 * 4.1 < held.min() <= held.max() < 25 + 5 * 4.1


def test_a_part_exchanges_no_tokens_with_another() -> None:
    order = order_of(a_shuffle(4), [5] * 8)
    assert sorted(order[:20]) == list(range(20))
    assert order[:20] != list(range(20))
    assert [place - 20 for place in order[20:]] != order[:20]
    assert order_of(a_shuffle(2), [5] * 8) == list(range(40))  # a part of one group has nowhere to go


def test_steps_layers_and_micro_batches_differ() -> None:
    first = order_of(a_shuffle(), [9] * 8)
    others = [a_shuffle(step=4), a_shuffle(key=8), a_shuffle(micro_batch=1)]
    assert all(order_of(other, [9] * 8) != first for other in others)
    assert order_of(a_shuffle(), [9] * 8) == first


def test_micro_batches_are_the_parts_of_the_step() -> None:
    whole = order_of(a_shuffle(4), [5] * 8)
    halves = [order_of(a_shuffle(4, micro_batch=i), [5] * 4) for i in range(2)]
    assert whole == halves[0] + [20 + place for place in halves[1]]


def test_nothing_is_shuffled_between_steps() -> None:
    shuffle = a_shuffle()
    shuffle.end()
    assert shuffle.deal(groups_of([5] * 8)) is None


def test_a_pass_that_is_no_whole_number_of_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="shuffle_tokens=6 does not divide the 8 sequences of a pass"):
        a_shuffle(6).deal(groups_of([5] * 8))
    with pytest.raises(ValueError, match="shuffle_tokens=3 is no multiple of"):
        Shuffle(GROUP, 3)


@pytest.mark.parametrize(
    ("router", "options", "among", "accumulation", "sentence"),
    [
        ("switch", {"balance_scope": "sequence"}, True, 1, "a balancing loss of Switch over single sequences"),
        ("loss_free", {"sequence_loss": True}, 4, 1, "a balancing loss of LossFree over single sequences"),
        ("base", {}, True, 2, "shuffle among the sequences of one, model.shuffle_tokens=8, or among fewer"),
        ("base", {}, 6, 1, "model.shuffle_tokens=6 has to be a multiple of data.routing_group=4 and to divide the 16"),
        ("base", {}, 16, 2, "model.shuffle_tokens=16 has to be a multiple of data.routing_group=4 and to divide the 8"),
    ],
)
def test_what_cannot_be_shuffled_is_refused(
    router: str, options: dict, among: bool | int, accumulation: int, sentence: str
) -> None:
    given = {"routing_group": 4, "global_batch": 16, "accumulation": accumulation}
    check_shuffle(8 if accumulation == 2 else True, build_router("base"), **given)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_shuffle(among, build_router(router, **options), **given)


# Between two processes


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, lengths in LENGTHS.items():
        for among in (8, 4):
            shuffle = a_shuffle(among)
            shuffle.exchange = Exchange(torch.distributed.group.WORLD)
            shuffle.padding = name != "whole"
            first, mine = sum(lengths[: 4 * rank]), lengths[4 * rank : 4 * rank + 4]
            numbers = first + torch.arange(sum(mine))
            deal = dealt(shuffle, mine)
            tokens = numbers.double()[:, None].expand(-1, 3).clone().requires_grad_()
            rows = deal.shuffle(tokens)
            back = deal.unshuffle(rows * rows)
            (back * back).sum().backward()
            found[f"{name}, {among}"] = (deal.shuffle(numbers).tolist(), rows.detach(), back.detach(), tokens.grad)
    torch.save(found, Path(folder, f"{rank}.pt"))
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("shuffle")
    forks.call_on_two_ranks(on_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("among", [8, 4])
@pytest.mark.parametrize("name", LENGTHS)
def test_two_ranks_hold_what_one_would(ranks: list[dict], name: str, among: int) -> None:
    expected = order_of(a_shuffle(among), LENGTHS[name])
    found = [rank[f"{name}, {among}"] for rank in ranks]
    assert found[0][0] + found[1][0] == expected
    rows, back, gradient = (torch.cat([rank[i] for rank in found])[:, 0] for i in (1, 2, 3))
    number = torch.arange(len(expected)).double()
    assert rows.tolist() == expected
    assert torch.equal(back, number**2)
    assert torch.equal(gradient, 4 * number**3)  # d (x^2)^2 = 4 x^3, wherever it was squared
    if name == "whole" and among == 8:
        assert any(place >= 20 for place in found[0][0]), "no token has changed its rank"


# In a layer


def a_layer(name: str, **options: object) -> SparseLayer:
    router = build_router(name, **options)
    experts = Experts(num_experts=router.num_experts, width=WIDTH, hidden_width=16)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(1))
    return SparseLayer(router, experts, routing_group=GROUP, shuffle=a_shuffle())


def text(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, ids = random_tokens(8 * 12, seed)
    return tokens.view(8, 12, WIDTH), ids.view(8, 12)


CAUSAL = [name for name in ROUTERS if build_router(name).causal]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_router_stays_causal(name: str) -> None:
    """What a token gets does not change with the tokens after it, in its sequence and in those that follow."""
    options = {"capacity_factor": 0.5} if name == "switch" else {}
    layer = a_layer(name, **options)
    layer.router.prepare(torch.arange(1, VOCABULARY + 1))
    layer.train()
    (hidden, ids), (other, other_ids) = text(0), text(1)
    mixed, mixed_ids = hidden.clone(), ids.clone()
    mixed[5, 7:], mixed[6:] = other[5, 7:], other[6:]
    mixed_ids[5, 7:], mixed_ids[6:] = other_ids[5, 7:], other_ids[6:]
    before, after = layer(hidden, ids)[0].flatten(0, 1), layer(mixed, mixed_ids)[0].flatten(0, 1)
    torch.testing.assert_close(before[: 5 * 12 + 7], after[: 5 * 12 + 7])
    assert not torch.isclose(before[-12:], after[-12:]).any()


def test_the_shuffle_changes_which_tokens_are_balanced_against_each_other() -> None:
    layer = a_layer("base")
    hidden, ids = text(0)
    shuffled, _ = layer(hidden, ids)
    layer.shuffle.end()
    plain, _ = layer(hidden, ids)
    assert 0.1 < float((shuffled == plain).all(-1).double().mean()) < 0.95


def test_routers_that_look_at_one_token_alone_give_the_same_result() -> None:
    layer = a_layer("hash")
    hidden, ids = text(0)
    valid = torch.arange(12) < torch.tensor([12, 3, 0, 12, 7, 1, 12, 5])[:, None]
    shuffled, _ = layer(hidden, ids, valid)
    layer.shuffle.end()
    torch.testing.assert_close(shuffled, layer(hidden, ids, valid)[0])
