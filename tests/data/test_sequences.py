import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_corpora import write_split

from lightning_base.data import SequenceDataset

# Stream:   5 6 0 | 7 0 | 8 9 10 0
# Position: 0 1 2   3 4   5 6  7 8
THREE_DOCUMENTS = [[5, 6, 0], [7, 0], [8, 9, 10, 0]]


def lists(dataset: SequenceDataset, name: str) -> list[list[int]]:
    return [dataset[i][name].tolist() for i in range(len(dataset))]


def test_packed_sequences_cut_the_stream_and_predict_every_token_from_the_one_before(tmp_path: Path) -> None:
    dataset = SequenceDataset(write_split(tmp_path, THREE_DOCUMENTS), 4)
    # The first token is predicted from an end of text that stands before the stream.
    assert lists(dataset, "input_ids") == [[0, 5, 6, 0], [7, 0, 8, 9], [10, 0, 0, 0]]
    assert lists(dataset, "targets") == [[5, 6, 0, 7], [0, 8, 9, 10], [0, -100, -100, -100]]
    assert lists(dataset, "valid") == [[True] * 4, [True] * 4, [True, False, False, False]]
    # An end of text belongs to the document it ends.
    assert lists(dataset, "document") == [[0, 0, 0, 0], [1, 1, 2, 2], [2, -1, -1, -1]]
    assert dataset.number_of_targets(np.asarray([0, 1, 2, -1])).tolist() == [4, 4, 1, 0]


def test_without_attention_across_documents_the_first_token_of_the_next_document_is_no_target(tmp_path: Path) -> None:
    dataset = SequenceDataset(write_split(tmp_path, THREE_DOCUMENTS), 4, attend_across_documents=False)
    assert lists(dataset, "targets") == [[5, 6, 0, -100], [0, -100, 9, 10], [0, -100, -100, -100]]
    assert lists(dataset, "valid") == [[True] * 4, [True] * 4, [True, False, False, False]]
    assert dataset.number_of_targets(np.asarray([0, 1, 2, -1])).tolist() == [3, 3, 1, 0]


def test_sequences_of_documents_never_cross_a_boundary(tmp_path: Path) -> None:
    dataset = SequenceDataset(write_split(tmp_path, THREE_DOCUMENTS), 2, "documents")
    assert lists(dataset, "input_ids") == [[0, 5], [6, 0], [0, 7], [0, 8], [9, 10]]
    assert lists(dataset, "targets") == [[5, 6], [0, -100], [7, 0], [8, 9], [10, 0]]
    assert lists(dataset, "document") == [[0, 0], [0, -1], [1, 1], [2, 2], [2, 2]]
    assert dataset.number_of_targets(np.arange(5)).tolist() == [2, 1, 2, 2, 2]


def test_training_leaves_out_the_unfilled_last_sequence(tmp_path: Path) -> None:
    assert len(SequenceDataset(write_split(tmp_path, THREE_DOCUMENTS), 4, drop_last=True)) == 2


def test_item_minus_one_is_nothing_but_padding(tmp_path: Path) -> None:
    for packing in ("packed", "documents"):
        dataset = SequenceDataset(write_split(tmp_path, THREE_DOCUMENTS), 3, packing)
        item = dataset[-1]
        assert {name: tensor.tolist() for name, tensor in item.items()} == {
            "input_ids": [0, 0, 0],
            "targets": [-100] * 3,
            "valid": [False] * 3,
            "document": [-1] * 3,
        }
        with pytest.raises(IndexError):
            dataset[len(dataset)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    length=st.integers(1, 9),
    packing=st.sampled_from(["packed", "documents"]),
    attend=st.booleans(),
)
def test_every_token_is_a_target_exactly_once(lengths: list[int], length: int, packing: str, attend: bool) -> None:
    # Token p stands at position p, so a target says where it comes from.
    ends = np.cumsum(lengths)
    documents = [list(range(end - size, end)) for end, size in zip(ends, lengths, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        dataset = SequenceDataset(write_split(Path(folder), documents), length, packing, attend_across_documents=attend)
        items = [dataset[i] for i in range(len(dataset))]
        counted = dataset.number_of_targets(np.arange(len(dataset)))
    targets = torch.stack([item["targets"] for item in items])
    inputs = torch.stack([item["input_ids"] for item in items])
    valid = torch.stack([item["valid"] for item in items])
    document = torch.stack([item["document"] for item in items])
    masked = set(ends[:-1].tolist()) if packing == "packed" and not attend else set()
    assert sorted(targets[targets != -100].tolist()) == [p for p in range(ends[-1]) if p not in masked]
    assert counted.tolist() == (targets != -100).sum(1).tolist()
    assert int(valid.sum()) == ends[-1]
    assert not valid[:, 1:][~valid[:, :-1]].any(), "padding only at the end"
    assert (document == -1).equal(~valid)
    inside = (targets > 0) & ~torch.isin(targets, torch.tensor([0, *ends[:-1].tolist()]))
    assert inputs[inside].equal(targets[inside] - 1)
    owner = torch.from_numpy(np.searchsorted(ends, inputs[inside].numpy(), side="right"))
    assert document[inside].equal(owner)


def test_a_pickled_data_set_opens_the_files_again_instead_of_copying_them(tmp_path: Path) -> None:
    dataset = SequenceDataset(write_split(tmp_path, [[1] * 50_000 + [0]]), 16)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 2_000
    assert pickle.loads(pickled)[7]["targets"].equal(dataset[7]["targets"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sequence_length": 0}, "data.sequence_length=0 is no length"),
        ({"sequence_length": 4, "packing": "loose"}, "data.packing=loose .* choose packed or documents"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path: Path, arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SequenceDataset(write_split(tmp_path, THREE_DOCUMENTS), **arguments)
