import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_base.data import CorpusError, Document, TextFiles


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_rows(path: Path, rows: dict) -> Path:
    pq.write_table(pa.table(rows), path)
    return path


def test_a_text_file_is_a_document_of_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "poems" / "b.txt", "second\r\n")
    write(tmp_path / "poems" / "a.txt", "first é")
    write(tmp_path / "prose" / "c.txt", b"\xef\xbb\xbfthird")
    assert list(TextFiles(f"{tmp_path}/**/*.txt").documents()) == [
        Document("poems/a.txt", "poems", "first é"),
        Document("poems/b.txt", "poems", "second\r\n"),
        Document("prose/c.txt", "prose", "third"),
    ]


def test_a_row_is_a_document_of_its_file(tmp_path: Path) -> None:
    lines = [{"text": "one"}, {"text": None}, {"text": "two", "other": 1}]
    write(tmp_path / "web.jsonl", "\n\n".join(json.dumps(line) for line in lines) + "\n")
    write_rows(tmp_path / "books.parquet", {"text": ["three", None, "four"], "id": [1, 2, 3]})
    assert list(TextFiles([f"{tmp_path}/*.jsonl", f"{tmp_path}/books.parquet"]).documents()) == [
        Document("books.parquet#1", "books", "three"),
        Document("books.parquet#3", "books", "four"),
        Document("web.jsonl#1", "web", "one"),
        Document("web.jsonl#5", "web", "two"),
    ]


def test_another_column_can_hold_the_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", {"content": pa.array(["x", "y", "x"]).dictionary_encode()})
    assert [document.text for document in TextFiles(f"{tmp_path}/*", column="content").documents()] == ["x", "y", "x"]


def test_a_long_text_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    content = "".join(f"line {i}\n" for i in range(100))
    write(tmp_path / "long.txt", content)
    documents = list(TextFiles(f"{tmp_path}/long.txt", document_characters=200).documents())
    assert [document.name for document in documents] == ["long.txt", "long.txt#1", "long.txt#2", "long.txt#3"]
    assert "".join(document.text for document in documents) == content
    assert all(document.text.endswith("\n") and len(document.text) < 210 for document in documents)
    (whole,) = TextFiles(f"{tmp_path}/long.txt", document_characters=None).documents()
    assert whole.text == content


def test_a_long_text_without_lines_is_cut_all_the_same(tmp_path: Path) -> None:
    write(tmp_path / "long.txt", "x" * 20_000)
    sizes = [len(document.text) for document in TextFiles(f"{tmp_path}/long.txt", document_characters=100).documents()]
    assert sum(sizes) == 20_000
    assert max(sizes) < 5_000


def test_moved_files_are_the_same_corpus(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        write(tmp_path / folder / "texts" / "a.txt", "one")
        write(tmp_path / folder / "texts" / "b.txt", "two")
    here, there = (list(TextFiles(f"{tmp_path}/{folder}/**/*.txt").documents()) for folder in ("here", "there"))
    assert here == there


def message(corpus: TextFiles) -> str:
    with pytest.raises(CorpusError) as error:
        list(corpus.documents())
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def test_a_glob_that_matches_nothing_is_named(tmp_path: Path) -> None:
    sentence = message(TextFiles(f"{tmp_path}/*.txt"))
    assert sentence.startswith(f"data.corpus.files={tmp_path}/*.txt matches no file")
    write(tmp_path / "a.txt", "text")
    assert "nothing-here*" in message(TextFiles([f"{tmp_path}/*.txt", "nothing-here*"]))
    assert "empty list" in message(TextFiles([]))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "a.txt is empty: remove it"),
        ("a.txt", b"text\0more", "a.txt is not UTF-8 text but binary data"),
        ("a.txt", b"\x89PNG\xff\xfe", "a.txt is not UTF-8 text but binary data"),
        ("a.jsonl", b"\x00\x01", "a.jsonl is not UTF-8 text but binary data"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl is not UTF-8 text but binary data"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 of"),
        ("a.jsonl", b'["text"]', "is a list: give a JSON object per line"),
        ("a.jsonl", b'{"text": 3}', "data.corpus.column=text holds a int in line 1"),
        ("a.jsonl", b'{"texts": "x", "id": 1}', "did you mean texts?"),
        ("a.jsonl", b'{"n": 1, "id": 1}', "it has id, n."),
        ("a.parquet", b"no parquet at all", "is not a Parquet file"),
        ("a.csv", b"text\nx", "a.csv is none of .txt, .jsonl, .parquet"),
    ],
)
def test_a_file_that_will_not_do_is_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    write(tmp_path / name, content)
    sentence = message(TextFiles(f"{tmp_path}/*"))
    assert expected in sentence
    assert sentence.startswith("data.corpus.")


def test_a_parquet_column_that_will_not_do_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", {"content": ["x"], "id": [1]})
    assert "data.corpus.column=contents is not a column of" in message(TextFiles(f"{tmp_path}/*", column="contents"))
    assert "did you mean content?" in message(TextFiles(f"{tmp_path}/*", column="contents"))
    assert "data.corpus.column=id is of type int64" in message(TextFiles(f"{tmp_path}/*", column="id"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text").chmod(0)
    assert "a.txt cannot be read" in message(TextFiles(f"{tmp_path}/*"))


def test_a_length_of_zero_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"data\.corpus\.document_characters=0 is too small"):
        TextFiles("*.txt", document_characters=0)
