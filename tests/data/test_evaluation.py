import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_base.data import EvaluationSampler


def ranks(world_size: int, **arguments: int | None) -> list[list[list[int]]]:
    """[rank][batch][index]"""
    return [list(EvaluationSampler(world_size=world_size, rank=rank, **arguments)) for rank in range(world_size)]


def test_the_last_batch_is_filled_with_padding() -> None:
    # 7 sequences, 4 at a time, groups of 2 on 2 ranks: the second batch has 4, 5 on rank 0 and 6 on rank 1.
    assert ranks(2, dataset_length=7, global_batch=4, group_sequences=2) == [
        [[0, 1], [4, 5]],
        [[2, 3], [6, -1]],
    ]


@settings(max_examples=100, deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 3]),
    dataset_length=st.integers(1, 60),
    per_rank=st.integers(1, 3),
    group=st.integers(1, 4),
    limit=st.none() | st.integers(1, 70),
)
def test_every_sequence_is_evaluated_once_and_no_rank_waits(
    world_size: int, dataset_length: int, per_rank: int, group: int, limit: int | None
) -> None:
    arguments = {
        "dataset_length": dataset_length,
        "global_batch": 6 * per_rank * group,
        "group_sequences": group,
        "limit": limit,
    }
    found = ranks(world_size, **arguments)
    assert len({tuple(len(batch) for batch in batches) for batches in found}) == 1
    order = [index for batches in zip(*found, strict=True) for batch in batches for index in batch]
    real = [index for index in order if index != -1]
    assert order[: len(real)] == real, "padding only at the end"
    expected = min(dataset_length, limit or dataset_length)
    assert len(set(real)) == len(real) == expected
    assert real == sorted(real)
    # The routing groups are the same whatever the world size.
    one = [index for batch in ranks(1, **arguments)[0] for index in batch]
    assert order == one


def test_a_limit_takes_sequences_from_everywhere() -> None:
    assert ranks(1, dataset_length=100, global_batch=4, limit=4) == [[[0, 25, 50, 75]]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"global_batch": 6, "group_sequences": 4}, "cannot be divided by ranks x data.routing_group = 1 x 4"),
        ({"global_batch": 4, "limit": 0}, "data.validation_sequences=0 evaluates nothing"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EvaluationSampler(10, **arguments)
