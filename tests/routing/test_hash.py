"""Hash layers: the table, and that routing is nothing but looking it up."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from router_arms import VOCABULARY, build_router, decisions, groups_of, random_tokens

from lightning_base.routing import Hash
from lightning_base.routing.hash import balanced_table


def hash_router(**options: object) -> Hash:
    router = build_router("hash", **options)
    assert isinstance(router, Hash)
    return router


def test_the_balanced_table_by_hand() -> None:
    # 5 -> expert 0 (5, 0); 4 -> 1 (5, 4); 3 -> 1 (5, 7); 3 -> 0 (8, 7); 1 -> 1 (8, 8). The three unseen in turn.
    assert balanced_table([5, 4, 3, 3, 1, 0, 0, 0], 2).tolist() == [0, 1, 1, 0, 1, 0, 1, 0]
    # The same counts under other ids: order goes by frequency.
    assert balanced_table([0, 1, 3, 0, 3, 4, 5, 0], 2).tolist() == [0, 1, 1, 1, 0, 1, 0, 0]


def test_ties_go_to_the_smaller_id() -> None:
    assert balanced_table([2, 2, 2, 2, 2], 3).tolist() == [0, 1, 2, 0, 1]


@given(counts=st.lists(st.integers(0, 50), min_size=4, max_size=60))
def test_experts_differ_by_no_more_than_the_most_frequent_token(counts: list[int]) -> None:
    totals = [0] * 4
    for token, expert in enumerate(balanced_table(counts, 4).tolist()):
        totals[expert] += counts[token]
    assert max(totals) - min(totals) <= max(counts)


def test_tokens_that_the_training_text_lacks_are_dealt_out_evenly() -> None:
    table = balanced_table([100, 1, 1, *[0] * 40], 4)
    assert torch.bincount(table[3:], minlength=4).tolist() == [10] * 4


def test_before_frequencies_are_known_the_table_is_round_robin() -> None:
    assert hash_router().table.tolist() == [token % 8 for token in range(VOCABULARY)]


def test_prepare_gives_the_same_table_whenever_and_however_often_it_is_called() -> None:
    counts = torch.randint(0, 1_000, (VOCABULARY,), generator=torch.Generator().manual_seed(0))
    one, other = hash_router(seed=1), hash_router(seed=2)
    one.prepare(counts)
    other.prepare(counts.flip(0))
    other.prepare(counts)
    assert torch.equal(one.table, other.table)
    assert one.table.tolist() != [token % 8 for token in range(VOCABULARY)]


def test_balance_on_the_training_text_is_what_the_table_is_for() -> None:
    # Frequencies after Zipf; the most frequent token alone has 1 / H(100) = 19 % of the text, more than 1/8.
    counts = torch.tensor([100_000 // (rank + 1) for rank in range(VOCABULARY)])
    text = torch.arange(VOCABULARY).repeat_interleave(counts // 50)
    loads = {}
    for variant in ("balanced", "random"):
        router = hash_router(variant=variant)
        router.prepare(counts)
        loads[variant] = router(torch.zeros(len(text), 16), text, groups_of(len(text))).demand
    # Expert 0 has that token and no other; the rest of the text is shared by seven almost evenly.
    assert loads["balanced"][0].item() == 2_000
    assert loads["balanced"][1:].max() - loads["balanced"][1:].min() < 50
    assert loads["random"].max() > loads["balanced"].max()


def test_the_random_table_is_drawn_from_the_seed_and_does_not_ask_for_frequencies() -> None:
    one, same, other = (hash_router(variant="random", seed=seed) for seed in (1, 1, 2))
    same.prepare(torch.arange(VOCABULARY))
    assert torch.equal(one.table, same.table)
    assert not torch.equal(one.table, other.table)
    assert set(one.table.tolist()) == set(range(8))


def test_a_token_goes_where_its_id_says_with_weight_one_whatever_its_vector() -> None:
    router = hash_router()
    router.prepare(torch.arange(VOCABULARY))
    tokens, ids = random_tokens(30)
    expected = [[(router.table.tolist()[token], 1.0)] for token in ids.tolist()]
    for vectors in (tokens, -tokens):
        assert decisions(router(vectors, ids, groups_of(30))) == expected


def test_the_table_is_in_the_checkpoint_and_stays_whole_in_half_precision() -> None:
    router = hash_router().bfloat16()
    assert router.state_dict()["table"].dtype == torch.int64
    fresh = hash_router(variant="random")
    fresh.load_state_dict(router.state_dict())
    assert torch.equal(fresh.table, router.table)


def test_there_is_nothing_to_learn() -> None:
    router = hash_router()
    assert list(router.parameters()) == []
    assert router.loss_coefficients == {}
