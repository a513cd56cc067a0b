import sys
from pathlib import Path

import datasets
import pytest

from lightning_base.data import CorpusError, Document, HuggingFace, prepare

ROWS = {"text": ["one", None, "three"], "lang": ["en", "de", "fr"]}


@pytest.fixture
def saved(tmp_path: Path) -> str:
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def message(corpus: HuggingFace) -> str:
    with pytest.raises(CorpusError) as error:
        list(corpus.documents())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rows_of_a_saved_data_set_are_documents(saved: str) -> None:
    assert list(HuggingFace(saved).documents()) == [
        Document("train#1", "saved", "one"),
        Document("train#3", "saved", "three"),
    ]


def test_a_column_can_name_the_domain(saved: str) -> None:
    assert [document.domain for document in HuggingFace(saved, domain_column="lang").documents()] == ["en", "fr"]


def test_a_split_is_taken_from_a_saved_dictionary(tmp_path: Path) -> None:
    parts = {"train": datasets.Dataset.from_dict(ROWS), "test": datasets.Dataset.from_dict({"text": ["four"]})}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    corpus = HuggingFace(str(tmp_path / "parts"), split="test")
    assert list(corpus.documents()) == [Document("test#1", "parts", "four")]
    assert "data.corpus.split=dev is not in" in message(HuggingFace(str(tmp_path / "parts"), split="dev"))


def test_a_folder_of_data_files_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [document.text for document in HuggingFace(str(tmp_path / "files")).documents()] == ["one", "two"]


def test_a_saved_data_set_can_be_prepared(tmp_path: Path) -> None:
    rows = {"text": [f"row {i}" for i in range(30)], "lang": ["en", "de"] * 15}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    corpus = HuggingFace(str(tmp_path / "saved"), domain_column="lang")
    prepared = prepare(corpus, vocab_size=257, cache_dir=tmp_path / "cache")
    assert prepared.domains == ["en", "de"]
    assert prepared.train.documents + prepared.validation.documents == 30


def test_columns_that_are_not_there_are_named_with_the_nearest(saved: str) -> None:
    assert "data.corpus.column=texts is not a column of" in message(HuggingFace(saved, column="texts"))
    assert "did you mean text?" in message(HuggingFace(saved, column="texts"))
    assert "data.corpus.domain_column=language is not" in message(HuggingFace(saved, domain_column="language"))


def test_a_column_of_numbers_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": [1, 2]}).save_to_disk(tmp_path / "saved")
    assert "data.corpus.column=text holds a int in row 1" in message(HuggingFace(str(tmp_path / "saved")))


def test_a_data_set_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert "data.corpus.path=" in message(HuggingFace(str(tmp_path / "nowhere")))


def test_without_the_library_the_message_says_what_to_install(saved: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "lightning-base[huggingface]" in message(HuggingFace(saved))
