import json
import re
import struct
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_base.data import CorpusError, HuggingFace, PreparedCorpus, TextFiles, TokenFiles, prepare
from lightning_base.data.tokenizer import train_tokenizer

END = 9
# Four documents, one of them empty, and the end of text behind all but the last.
STREAM = [1, 2, 3, END, 4, END, END, 5, 6]
DOCUMENTS = [[1, 2, 3], [4], [5, 6]]


def read(folder: Path, **options: Any) -> list[tuple[str, str, list[int]]]:
    corpus = TokenFiles(f"{folder}/*", **{"end_of_text": END} | options)
    return [(name, domain, ids.tolist()) for name, domain, ids in corpus.documents() if len(ids)]


def ids_of(folder: Path, **options: Any) -> list[list[int]]:
    return [ids for _, _, ids in read(folder, **options)]


def all_tokens(prepared: PreparedCorpus) -> list[list[int]]:
    """The documents of both splits, sorted."""
    found = []
    for split in (prepared.train, prepared.validation):
        bounds = zip(split.offsets[:-1], split.offsets[1:], strict=True)
        found += [split.tokens[start:stop].tolist() for start, stop in bounds]
    return sorted(found)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", ">i8"])
def test_an_array_is_cut_where_its_documents_end(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.asarray(STREAM, dtype=dtype))
    np.save(tmp_path / "b.npy", np.asarray([7, 8], dtype=dtype))
    assert read(tmp_path) == [
        ("a.npy#1", "a", [1, 2, 3]),
        ("a.npy#2", "a", [4]),
        ("a.npy#3", "a", [5, 6]),
        ("b.npy#1", "b", [7, 8]),
    ]


def test_a_raw_file_is_read_as_the_type_it_is_said_to_have(tmp_path: Path) -> None:
    np.asarray(STREAM, dtype="<u2").tofile(tmp_path / "a.bin")
    assert ids_of(tmp_path, dtype="uint16") == DOCUMENTS


def test_ends_of_text_are_found_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.asarray(STREAM))
    for block in range(1, 5):
        monkeypatch.setattr("lightning_base.data.tokens.BLOCK", block)
        assert ids_of(tmp_path) == DOCUMENTS


def test_an_array_beside_can_say_where_documents_begin(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(7))
    np.save(tmp_path / "a_offsets.npy", np.asarray([0, 2, 2, 7]))
    assert ids_of(tmp_path, index="_offsets.npy") == [[0, 1], [2, 3, 4, 5, 6]]


def megatron(folder: Path, sequences: list[list[int]], bounds: list[int], dtype: str = "<u2", code: int = 8) -> None:
    """Written as Megatron's documentation has it: sequences, of which some make a document."""
    np.concatenate(sequences).astype(dtype).tofile(folder / "a.bin")
    lengths = [len(sequence) for sequence in sequences]
    pointers = [sum(lengths[:i]) * np.dtype(dtype).itemsize for i in range(len(lengths))]
    parts = (np.asarray(lengths, "<i4"), np.asarray(pointers, "<i8"), np.asarray(bounds, "<i8"))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
    (folder / "a.idx").write_bytes(header + b"".join(part.tobytes() for part in parts))


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4), ("<u1", 1)])
def test_an_index_of_megatron_says_where_documents_begin_and_what_type_ids_are(
    tmp_path: Path, dtype: str, code: int
) -> None:
    megatron(tmp_path, [[1, 2], [3, END], [4, END], [5]], [0, 2, 3, 4], dtype, code)
    assert ids_of(tmp_path, index=".idx") == [[1, 2, 3, END], [4, END], [5]]


def test_a_long_document_is_cut(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asarray([1, 2, 3, 4, 5, END, 6]))
    assert ids_of(tmp_path, document_tokens=2) == [[1, 2], [3, 4], [5], [6]]
    assert ids_of(tmp_path, document_tokens=None) == [[1, 2, 3, 4, 5], [6]]


def test_every_document_is_prepared_with_one_end_of_text_whatever_it_came_with(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    megatron(tmp_path / "one", [[1, 2, END], [3], [4, END, END], [5, 6, 7]], [0, 1, 2, 3, 4])
    corpus = TokenFiles(str(tmp_path / "one" / "*.bin"), index=".idx", end_of_text=END)
    prepared = prepare(corpus, vocab_size=10, end_of_text=END, validation_fraction=0.3, cache_dir=tmp_path / "cache")
    assert all_tokens(prepared) == [[1, 2, END], [3, END], [4, END, END], [5, 6, 7, END]]
    assert (prepared.vocab_size, prepared.eos_id, prepared.tokenizer()) == (10, END, None)
    assert prepared.bytes_per_token is None
    assert "train_bytes" not in prepared.statistics
    assert prepared.statistics["train_documents"] + prepared.statistics["validation_documents"] == 4


def test_the_same_ids_are_the_same_corpus_in_any_type_and_in_rows(tmp_path: Path) -> None:
    rows = [list(range(i, i + 5)) for i in range(20)]
    stream = np.concatenate([[*row, 99] for row in rows])
    for dtype in ("uint16", "int64"):
        (tmp_path / dtype).mkdir()
        np.save(tmp_path / dtype / "a.npy", stream.astype(dtype))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "saved")
    corpora = [
        TokenFiles(f"{tmp_path}/uint16/*.npy", end_of_text=99),
        TokenFiles(f"{tmp_path}/int64/*.npy", end_of_text=99),
        TextFiles(f"{tmp_path}/a.jsonl", column="input_ids"),
        TextFiles(f"{tmp_path}/a.parquet", column="input_ids"),
        HuggingFace(str(tmp_path / "saved"), column="input_ids"),
    ]
    options: dict = {"vocab_size": 100, "end_of_text": 99, "validation_fraction": 0.2, "cache_dir": tmp_path / "cache"}
    found = [prepare(corpus, **options) for corpus in corpora]
    assert len({prepared.fingerprint for prepared in found}) == 1
    assert all_tokens(found[0]) == sorted([*row, 99] for row in rows)
    assert found[0].folder == found[1].folder


def test_a_byte_level_tokenizer_says_what_ids_stand_for(tmp_path: Path) -> None:
    texts = [f"document {i} is about é and routers\n" for i in range(40)]
    tokenizer = train_tokenizer(iter(texts), 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoded = [[*encoding.ids, 0] for encoding in tokenizer.encode_batch(texts)]
    np.save(tmp_path / "a.npy", np.concatenate(encoded))
    corpus = TokenFiles(f"{tmp_path}/*.npy", end_of_text=0)
    prepared = prepare(corpus, vocab_size=500, tokenizer=tmp_path, cache_dir=tmp_path / "cache")
    assert prepared.vocab_size == tokenizer.get_vocab_size()
    assert prepared.bytes_per_token is not None
    size = sum(int(prepared.bytes_per_token[split.tokens].sum()) for split in (prepared.train, prepared.validation))
    assert size == sum(len(text.encode()) for text in texts)


def message(tmp_path: Path, **options: Any) -> str:
    with pytest.raises(CorpusError) as error:
        ids_of(tmp_path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "options", "sentence"),
    [
        ("a.npy", np.zeros((2, 3), int), {}, r"data.corpus.files: .*a.npy holds int64\[2, 3\]: give one array"),
        ("a.npy", np.zeros(3), {}, r"a.npy holds float64\[3\]"),
        ("a.npy", b"no array", {}, "a.npy is not an array in NumPy's format"),
        ("a.npy", np.asarray([{}, []], object), {}, "a.npy is not an array in NumPy's format"),
        ("a.npy", b"", {}, "a.npy is empty"),
        ("a.txt", b"text", {}, "a.txt is none of .npy, .bin"),
        ("a.bin", b"1234", {}, "data.corpus.dtype=null: .*a.bin does not say .* give uint16"),
        ("a.bin", b"12345", {"dtype": "uint16"}, "data.corpus.dtype=uint16: the 5 bytes of .* no multiple of 2"),
        ("a.npy", np.zeros(3, int), {"index": ".idx"}, "data.corpus.index=.idx: .*a.idx is not there"),
        ("a.npy", np.zeros(3, int), {"index": "idx"}, "data.corpus.index=idx is no ending"),
        ("a.npy", np.zeros(3, int), {"document_tokens": 0}, "data.corpus.document_tokens=0 is too small"),
        ("a.npy", np.zeros(3, int), {"end_of_text": None}, "data.end_of_text=null, and token ids do not say"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(
    tmp_path: Path, name: str, content: Any, options: dict[str, Any], sentence: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    assert re.search(sentence, message(tmp_path, **options))


def test_an_index_that_does_not_fit_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(7))
    for wrong in ([0, 2], [1, 7], [0, 5, 3, 7], [7]):
        np.save(tmp_path / "a_offsets.npy", np.asarray(wrong))
        assert "a_offsets.npy does not fit the 7 ids of" in message(tmp_path, index="_offsets.npy")
    megatron(tmp_path, [[1, 2], [3]], [0, 2])
    (tmp_path / "a.npy").unlink()
    (tmp_path / "a_offsets.npy").unlink()
    whole = (tmp_path / "a.idx").read_bytes()
    for wrong_bytes in (whole[:-20], whole[:20], whole[:9] + b"\x07" + whole[10:], whole[:17] + b"\x07" + whole[18:]):
        (tmp_path / "a.idx").write_bytes(wrong_bytes)
        assert "a.idx" in message(tmp_path, index=".idx")


@pytest.mark.parametrize(
    ("ids", "options", "sentence"),
    [
        ([1, 2, END, 700], {}, "data.vocab_size=10 is too small for the token ids .* up to 700: give 701 or more"),
        ([1, -2, END, 3], {}, "a.npy#1 holds -2, which is no token id"),
        ([1, 2, END, 3], {"end_of_text": 10}, "data.end_of_text=10 is none of the data.vocab_size=10 ids"),
        ([1, 2, END, 3], {"end_of_text": "</s>"}, "data.end_of_text=</s> names a token, which only data.tokenizer"),
        ([1, 2, END, 3], {"end_of_text": None, "vocab_size": 500}, "data.end_of_text=null, and token ids do not say"),
        ([END, END], {}, "data.corpus holds no text at all, and no ids"),
    ],
)
def test_ids_that_do_not_fit_the_vocabulary_are_refused_before_anything_is_written(
    tmp_path: Path, ids: list[int], options: dict[str, Any], sentence: str
) -> None:
    np.save(tmp_path / "a.npy", np.asarray(ids))
    given = {"vocab_size": 10, "end_of_text": END, "cache_dir": tmp_path / "cache"} | options
    with pytest.raises(CorpusError, match=sentence) as error:
        prepare(TokenFiles(f"{tmp_path}/*.npy", end_of_text=END), **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_text_and_ids_in_one_corpus_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": "text"}\n{"x": [1, 2]}\n')
    with pytest.raises(CorpusError, match=r"document a\.jsonl#2 holds token ids, and those before it do not"):
        prepare(TextFiles(f"{tmp_path}/*.jsonl", column="x"), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("value", ["[1.5, 2]", "[[1], [2, 3]]", '["a"]', "[true]", "{}", "[1, 99999999999999999999]"])
def test_a_list_of_something_else_is_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"x": {value}}}\n')
    with pytest.raises(CorpusError, match=r"data\.corpus\.column=x holds a .* in line 1 .* or of lists of token ids"):
        list(TextFiles(f"{tmp_path}/*.jsonl", column="x").documents())
