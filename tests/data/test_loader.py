from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_corpora import write_split

from lightning_base.data import GlobalBatchSampler, SequenceDataset, TokenLoader, TrainingLoader

STEPS = 7
GLOBAL_BATCH = 8


@pytest.fixture
def dataset(tmp_path: Path) -> SequenceDataset:
    # 27 sequences of different numbers of targets: 56 positions of a run go through them twice and a bit.
    random = np.random.default_rng(0)
    documents = [[*random.integers(1, 99, random.integers(1, 4)).tolist(), 0] for _ in range(27)]
    return SequenceDataset(write_split(tmp_path, documents), 5, "documents")


def sampler(dataset: SequenceDataset, world_size: int = 1, rank: int = 0, accumulation: int = 1) -> GlobalBatchSampler:
    return GlobalBatchSampler(
        len(dataset),
        global_batch=GLOBAL_BATCH,
        seed=5,
        num_steps=STEPS,
        world_size=world_size,
        rank=rank,
        accumulation=accumulation,
    )


def loaders(dataset: SequenceDataset, world_size: int, accumulation: int, workers: int = 0) -> list[TrainingLoader]:
    return [
        TrainingLoader(dataset, sampler(dataset, world_size, rank, accumulation), workers) for rank in range(world_size)
    ]


def global_batches(found: list[TrainingLoader], accumulation: int) -> list[torch.Tensor]:
    """What all ranks consumed, [step][G, L], in the order of the global batch."""
    micro = [torch.cat([batch["targets"] for batch in ranks]) for ranks in zip(*found, strict=True)]
    return [torch.cat(micro[start : start + accumulation]) for start in range(0, len(micro), accumulation)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("world_size", "accumulation", "workers"),
    [(1, 2, 0), (2, 1, 0), (2, 2, 0), (4, 1, 0), (4, 2, 0), (1, 1, 2), (2, 2, 1)],
)
def test_the_global_batch_of_a_step_is_the_same_however_it_is_loaded(
    dataset: SequenceDataset, world_size: int, accumulation: int, workers: int
) -> None:
    expected = global_batches(loaders(dataset, 1, 1), 1)
    assert len(expected) == STEPS
    assert equal(global_batches(loaders(dataset, world_size, accumulation, workers), accumulation), expected)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 2)])
def test_step_targets_counts_the_targets_of_all_ranks_and_micro_batches(
    dataset: SequenceDataset, world_size: int, accumulation: int
) -> None:
    micro = list(zip(*loaders(dataset, world_size, accumulation), strict=True))
    seen = set()
    for start in range(0, len(micro), accumulation):
        step = [batch for ranks in micro[start : start + accumulation] for batch in ranks]
        targets = sum(int((batch["targets"] != -100).sum()) for batch in step)
        assert [batch["step_targets"].tolist() for batch in step] == [targets] * (world_size * accumulation)
        assert all(batch["step_targets"].shape == () and batch["step_targets"].dtype == torch.int64 for batch in step)
        seen.add(targets)
    assert len(seen) > 1, "the data must be able to tell steps apart"


@pytest.mark.parametrize(("workers", "workers_after"), [(0, 0), (2, 0), (0, 2), (2, 2)])
def test_a_run_that_was_cut_off_sees_exactly_the_rest(
    dataset: SequenceDataset, workers: int, workers_after: int
) -> None:
    (loader,) = loaders(dataset, 1, 2, workers)
    iterator = iter(loader)
    whole = [next(iterator) for _ in range(5)]
    state = loader.state_dict()
    # Workers have fetched further by now; what they fetched does not count as consumed.
    assert state == {"sequences_consumed": 5 * GLOBAL_BATCH // 2}
    whole += list(iterator)
    (resumed,) = loaders(dataset, 1, 2, workers_after)
    resumed.load_state_dict(state)
    rest = list(resumed)
    assert equal([batch["targets"] for batch in rest], [batch["targets"] for batch in whole[5:]])
    assert [batch["step_targets"] for batch in rest] == [batch["step_targets"] for batch in whole[5:]]
    assert len(resumed) == len(whole) == 2 * STEPS


def test_a_run_goes_on_with_another_world_size_and_accumulation(dataset: SequenceDataset) -> None:
    (loader,) = loaders(dataset, 1, 1)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    found = loaders(dataset, 4, 2)
    for resumed in found:
        resumed.load_state_dict(state)
    assert equal(global_batches(found, 2), global_batches(loaders(dataset, 1, 1), 1)[3:])


def test_a_finished_run_has_nothing_left_and_a_new_iteration_begins_again(dataset: SequenceDataset) -> None:
    (loader,) = loaders(dataset, 1, 1)
    first = list(loader)
    (resumed,) = loaders(dataset, 1, 1)
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []
    assert len(list(loader)) == len(first) == STEPS


def test_an_iterator_that_was_never_used_does_not_lose_the_place(dataset: SequenceDataset) -> None:
    (loader,) = loaders(dataset, 1, 1)
    loader.load_state_dict({"sequences_consumed": 2 * GLOBAL_BATCH})
    iter(loader)
    assert loader.state_dict() == {"sequences_consumed": 2 * GLOBAL_BATCH}
    assert len(list(loader)) == STEPS - 2


@pytest.mark.parametrize("workers", [0, 2])
def test_the_sampler_also_resumes_by_the_state_that_torchdata_keeps(dataset: SequenceDataset, workers: int) -> None:
    def plain() -> TokenLoader:
        return TokenLoader(dataset, sampler(dataset), workers)

    loader = plain()
    iterator = iter(loader)
    whole = [next(iterator)["targets"] for _ in range(3)]
    state = loader.state_dict()
    whole += [batch["targets"] for batch in iterator]
    resumed = plain()
    resumed.load_state_dict(state)
    assert equal([batch["targets"] for batch in resumed], whole[3:])
