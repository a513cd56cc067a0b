import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_base.data import GlobalBatchSampler, check_batch
from lightning_base.data.order import permutation


def run(world_size: int, accumulation: int, **arguments: int) -> list[list[list[int]]]:
    """[micro batch][rank][index] of a whole run."""
    ranks = [
        list(GlobalBatchSampler(world_size=world_size, rank=rank, accumulation=accumulation, **arguments))
        for rank in range(world_size)
    ]
    return [list(micro_batch) for micro_batch in zip(*ranks, strict=True)]


def flat(micro_batches: list[list[list[int]]]) -> list[int]:
    return [index for ranks in micro_batches for indices in ranks for index in indices]


def test_a_global_batch_is_laid_out_by_micro_batch_then_rank() -> None:
    one = flat(run(1, 1, dataset_length=100, global_batch=8, seed=3, num_steps=1))
    # Two ranks, two micro batches of two sequences: slots 01 and 23 on ranks 0 and 1, then 45 and 67.
    assert run(2, 2, dataset_length=100, global_batch=8, seed=3, num_steps=1) == [
        [one[0:2], one[2:4]],
        [one[4:6], one[6:8]],
    ]


@settings(max_examples=60, deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 4]),
    accumulation=st.sampled_from([1, 2]),
    dataset_length=st.integers(16, 40),
    seed=st.integers(0, 5),
    num_steps=st.integers(0, 9),
)
def test_the_order_is_the_same_for_any_world_size_and_accumulation(
    world_size: int, accumulation: int, dataset_length: int, seed: int, num_steps: int
) -> None:
    arguments = {"dataset_length": dataset_length, "global_batch": 16, "seed": seed, "num_steps": num_steps}
    order = flat(run(world_size, accumulation, **arguments))
    assert order == flat(run(1, 1, **arguments))
    assert len(order) == 16 * num_steps
    sampler = GlobalBatchSampler(**arguments)
    assert order == [int(index) for step in range(num_steps) for index in sampler.global_batch_at(step)]
    # Each epoch in it is a permutation of the whole data set.
    for start in range(0, len(order) - dataset_length + 1, dataset_length):
        assert sorted(order[start : start + dataset_length]) == list(range(dataset_length))


def test_epochs_and_seeds_are_ordered_differently() -> None:
    orders = [permutation(50, seed, epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


def test_the_order_is_the_one_of_the_raw_bits_of_philox() -> None:
    # Independent of the code under test: NumPy promises this stream in every version, and sorted() is Python's.
    bits = np.random.Philox(np.random.SeedSequence([7, 2])).random_raw(20).tolist()
    assert permutation(20, 7, 2).tolist() == sorted(range(20), key=bits.__getitem__)


@settings(max_examples=40, deadline=None)
@given(
    before=st.sampled_from([(1, 1), (2, 1), (4, 2), (1, 4)]),
    after=st.sampled_from([(1, 1), (2, 1), (4, 2), (1, 4)]),
    steps=st.integers(0, 6),
)
def test_a_run_goes_on_from_a_step_with_another_world_size_and_accumulation(
    before: tuple[int, int], after: tuple[int, int], steps: int
) -> None:
    arguments = {"dataset_length": 21, "global_batch": 16, "seed": 1, "num_steps": 6}
    sampler = GlobalBatchSampler(world_size=before[0], accumulation=before[1], rank=before[0] - 1, **arguments)
    iterator = iter(sampler)
    for _ in range(steps * before[1]):
        next(iterator)
    state = sampler.state_dict()
    assert state == {"sequences_consumed": 16 * steps}
    rest = []
    for rank in range(after[0]):
        resumed = GlobalBatchSampler(world_size=after[0], accumulation=after[1], rank=rank, **arguments)
        resumed.load_state_dict(state)
        rest.append(list(resumed))
    assert flat(list(zip(*rest, strict=True))) == flat(run(1, 1, **arguments))[16 * steps :]


def test_a_run_goes_on_from_inside_a_step_with_the_same_accumulation_only() -> None:
    arguments = {"dataset_length": 20, "global_batch": 8, "seed": 1, "num_steps": 3}
    sampler = GlobalBatchSampler(accumulation=2, **arguments)
    iterator = iter(sampler)
    whole = [next(iterator) for _ in range(3)]
    state = sampler.state_dict()
    whole += list(iterator)
    same = GlobalBatchSampler(accumulation=2, **arguments)
    same.load_state_dict(state)
    assert list(same) == whole[3:]
    with pytest.raises(ValueError, match=r"after 12 sequences, inside a step of data.global_batch=8"):
        GlobalBatchSampler(**arguments).load_state_dict(state)


def test_a_run_can_start_at_a_later_step() -> None:
    arguments = {"dataset_length": 20, "global_batch": 4, "seed": 1, "num_steps": 5}
    assert list(GlobalBatchSampler(start_step=2, **arguments)) == list(GlobalBatchSampler(**arguments))[2:]


def test_the_batch_must_be_whole_routing_groups_on_every_rank() -> None:
    check_batch(global_batch=32, world_size=2, accumulation=2, routing_group=8)
    sentence = (
        "data.global_batch=30 cannot be divided by trainer.devices x trainer.accumulate_grad_batches x "
        "data.routing_group = 2 x 1 x 8: choose a multiple of 16."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        check_batch(global_batch=30, world_size=2, accumulation=1, routing_group=8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dataset_length": 7}, "data.global_batch=8 is more than the 7 training sequences"),
        ({"dataset_length": 9, "seed": -1}, "seed=-1 is negative"),
        ({"dataset_length": 9, "world_size": 3}, "data.global_batch=8 cannot be divided"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GlobalBatchSampler(**({"global_batch": 8, "seed": 0, "num_steps": 1} | arguments))
