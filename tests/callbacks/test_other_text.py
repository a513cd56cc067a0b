"""What replaces the later tokens when a router's leak is measured. T tokens, G groups."""

import torch

from lightning_base.callbacks.causality import RouterInput, other_text
from lightning_base.routing import RoutingGroups


def text(first: int, *sizes: int) -> RouterInput:
    """Tokens that hold their ids, counted from ``first``."""
    ids = first + torch.arange(sum(sizes))
    return ids[:, None].float(), ids, RoutingGroups(sizes)


def replaced(own: RouterInput, other: RouterInput) -> list[int]:
    tokens, ids = other_text(own, other)
    assert tokens.flatten().tolist() == ids.tolist()
    return ids.tolist()


def test_each_group_gets_the_text_of_the_same_group_of_the_other_batch() -> None:
    assert replaced(text(0, 2, 3), text(100, 2, 3)) == [100, 101, 102, 103, 104]


def test_a_shorter_group_goes_round_and_a_longer_one_is_cut() -> None:
    assert replaced(text(0, 4, 1), text(100, 3, 2)) == [100, 101, 102, 100, 103]


def test_without_other_text_a_group_is_read_backwards() -> None:
    assert replaced(text(0, 2, 3), text(100, 0, 3)) == [1, 0, 100, 101, 102]
    own = text(0, 2, 3)
    assert replaced(own, own) == [1, 0, 4, 3, 2]


def test_groups_that_are_all_padding_get_nothing() -> None:
    assert replaced(text(0, 0, 2), text(100, 2, 0)) == [1, 0]
    assert replaced(text(0, 0, 0), text(100, 2, 2)) == []
