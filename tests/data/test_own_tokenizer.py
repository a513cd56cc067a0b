import csv
import hashlib
import math
import re
from pathlib import Path
from typing import Any

import forks
import numpy as np
import program
import pytest
from synthetic_corpora import ListCorpus, make_documents
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lightning_base.data import CorpusError, PreparedCorpus, TokenSplit, prepare, settled
from lightning_base.data.preparation import why_without_bytes

TEXTS = [document.text for document in make_documents(60)]


def byte_level(folder: Path, special: str = "<|endoftext|>") -> Path:
    """GPT-2's kind, saved with a length to cut texts at and a token to begin them with, as many are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<pad>", special], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{special} $A", special_tokens=[(special, 1)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=12)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def sentencepiece(folder: Path, normalizer: Any = None) -> Path:
    """Gemma's kind: ▁ for a space, bytes for what the vocabulary does not have."""
    words = {"<eos>": 0, "<unk>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for letter in "▁abcdefghijklmnopqrstuvwxyz":
        words[letter] = len(words)
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizer, spaces]) if normalizer else spaces
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def prepared_with(tokenizer: Path, cache: Path, texts: list[str] | None = None, **options: Any) -> PreparedCorpus:
    documents = [
        document._replace(text=text) for document, text in zip(make_documents(60), texts or TEXTS, strict=False)
    ]
    given = {"vocab_size": 300, "tokenizer": str(tokenizer), "cache_dir": cache} | options
    return prepare(ListCorpus(documents), **given)


def documents_of(split: TokenSplit) -> list[list[int]]:
    bounds = zip(split.offsets[:-1], split.offsets[1:], strict=True)
    return [split.tokens[start:stop].tolist() for start, stop in bounds]


def test_texts_are_written_in_the_tokens_of_the_tokenizer(tmp_path: Path) -> None:
    path = byte_level(tmp_path)
    prepared = prepared_with(path, tmp_path / "cache")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    expected = sorted([*tokenizer.encode(text, add_special_tokens=False).ids, 1] for text in TEXTS)
    assert sorted(documents_of(prepared.train) + documents_of(prepared.validation)) == expected
    assert (prepared.vocab_size, prepared.eos_id) == (290, 1)
    assert prepared.tokenizer_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_token_that_a_text_only_mentions_ends_no_document(tmp_path: Path) -> None:
    texts = [f"{text} <|endoftext|> and on" for text in TEXTS]
    prepared = prepared_with(byte_level(tmp_path), tmp_path / "cache", texts)
    assert all(document.index(1) == len(document) - 1 for document in documents_of(prepared.train))


@pytest.mark.parametrize(("end", "index"), [("<eos>", 0), (1, 1), ("a", 259)])
def test_the_end_of_text_is_a_token_by_name_or_by_id(tmp_path: Path, end: str | int, index: int) -> None:
    prepared = prepared_with(sentencepiece(tmp_path), tmp_path / "cache", end_of_text=end)
    assert prepared.eos_id == index
    assert set(prepared.train.tokens[prepared.train.offsets[1:] - 1].tolist()) == {index}


def test_tokenizer_end_of_text_and_content_each_have_a_cache_of_their_own(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = byte_level(tmp_path / "one"), byte_level(tmp_path / "two", "<|end|>")
    found = [
        prepared_with(one, tmp_path),
        prepared_with(one, tmp_path, end_of_text="<pad>"),
        prepared_with(two, tmp_path, end_of_text="<|end|>"),
        prepare(ListCorpus(make_documents(60)), vocab_size=290, cache_dir=tmp_path),
    ]
    assert len({prepared.folder for prepared in found}) == len({prepared.fingerprint for prepared in found}) == 4
    # A tokenizer of the same content elsewhere is the same, and asking for room for more tokens changes none.
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "mine.json").write_bytes(one.read_bytes())
    again = prepared_with(tmp_path / "three" / "mine.json", tmp_path, vocab_size=4096)
    assert again.folder == found[0].folder


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_bytes_per_token_add_up_to_the_bytes_of_the_text(tmp_path: Path, make: Any) -> None:
    prepared = prepared_with(make(tmp_path), tmp_path / "cache", end_of_text=0)
    assert prepared.bytes_per_token is not None
    total = sum(int(prepared.bytes_per_token[split.tokens].sum()) for split in (prepared.train, prepared.validation))
    assert total == sum(len(text.encode()) for text in TEXTS)
    assert prepared.statistics["train_bytes"] + prepared.statistics["validation_bytes"] == total


# é of two bytes becomes e of one; Llama 2 puts a space before every text.
@pytest.mark.parametrize(
    "normalizer",
    [normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), normalizers.Prepend("▁")],
    ids=["accents", "prefix"],
)
def test_where_tokens_do_not_stand_for_all_of_the_text_bits_per_byte_are_left_out(
    normalizer: Any, tmp_path: Path
) -> None:
    plain = sentencepiece(tmp_path, normalizer)
    prepared = prepared_with(plain, tmp_path / "cache", end_of_text="<eos>")
    assert prepared.bytes_per_token is None
    assert why_without_bytes(prepared).startswith("the tokens do not stand for all bytes")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tokenizer": "nowhere.json"}, r"^data\.tokenizer=nowhere.json is not there: give a tokenizer\.json"),
        ({"tokenizer": __file__}, r"^data\.tokenizer=.* is no tokenizer \(.*\): give a tokenizer\.json"),
        ({"vocab_size": 200}, r"^data\.vocab_size=200 is less than the 285 tokens of .*tokenizer\.json: give 285\."),
        ({}, r"^data\.end_of_text=null: .* has no <\|endoftext\|>: name the token .*, one of <eos>, or its id"),
        ({"end_of_text": "</s>"}, r"^data\.end_of_text=</s> is not in .*: name the token .* one of <eos>"),
        ({"end_of_text": 285}, r"^data\.end_of_text=285 is not in"),
        ({"tokenizer": None, "end_of_text": 3}, r"^data\.end_of_text=3 is for token ids, or goes with data\.tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_said_in_one_sentence(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    path = sentencepiece(tmp_path)
    given = {"vocab_size": 300, "tokenizer": path, "cache_dir": tmp_path / "cache"} | options
    with pytest.raises(CorpusError, match=sentence) as error:
        prepare(ListCorpus(make_documents(60)), **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_without_tokens_is_said_too(tmp_path: Path) -> None:
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CorpusError, match=r"tokenizer\.json has no tokens: train it first"):
        settled({"tokenizer": str(tmp_path)})


def test_a_run_takes_the_vocabulary_of_a_tokenizer_and_measures_bits_per_byte(
    small_corpus: list[str], tmp_path: Path
) -> None:
    path = byte_level(tmp_path)
    done = program.train(*small_corpus, "trainer.max_steps=2", f"data.tokenizer={path}", f"runs_dir={tmp_path}/runs")
    assert done.returncode == 0, done.stderr
    told = rf"^data: [\d,]+ tokens to train on, [\d,]+ to validate on, cached in {tmp_path.parent}"
    assert re.search(told, done.stderr, re.MULTILINE)
    assert f"data: data.vocab_size=290, with the 290 tokens of {path}" in done.stderr
    manifest = program.read(program.only_job(tmp_path / "runs") / "manifest.json")
    assert manifest["config"]["data"]["vocab_size"] == 290
    assert manifest["config"]["data"]["end_of_text"] == 1
    assert manifest["tokenizer_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    corpus, result = manifest["corpus"], manifest["result"]
    # The final evaluation predicts every validation token once.
    expected = result["final/loss"] * corpus["validation_tokens"] / math.log(2) / corpus["validation_bytes"]
    assert result["final/bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_a_run_on_token_ids_has_no_bits_per_byte_and_is_reported(small_corpus: list[str], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    np.save(tmp_path / "ids.npy", np.where(random.random(20_000) < 0.02, 64, random.integers(0, 64, 20_000)))
    own = ["data=tokens", f"data.corpus.files={tmp_path}/ids.npy", "data.vocab_size=65", "data.end_of_text=64"]
    rest = [item for item in small_corpus if not item.startswith(("data=", "data.corpus", "data.vocab"))]
    done = program.train(*rest, *own, "trainer.max_steps=2", f"runs_dir={tmp_path}/runs")
    assert done.returncode == 0, done.stderr
    assert "data: without bits per byte" in done.stderr
    job = program.only_job(tmp_path / "runs")
    manifest = program.read(job / "manifest.json")
    assert "final/bits_per_byte" not in manifest["result"]
    assert manifest["tokenizer_sha256"] is None
    # Ids drawn evenly cannot be predicted: the loss is near that of guessing.
    assert manifest["result"]["final/loss"] == pytest.approx(math.log(65), abs=0.3)
    report = forks.run(["-m", "lightning_base", "report", str(job.parent)])
    assert report.returncode == 0, report.stderr
    with (job.parent / "report_files" / "numbers.csv").open() as file:
        measured = {row["measure"] for row in csv.DictReader(file)}
    assert "validation loss" in measured
    assert "bits per byte" not in measured


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data=text", "data.corpus.files={folder}/a.jsonl", "data.corpus.column=contents"], "did you mean content?"),
        (["data.tokenizer=nowhere.json"], "data.tokenizer=nowhere.json is not there"),
        (["data.tokenizer={folder}", "data.end_of_text='</s>'"], "data.end_of_text=</s> is not in"),
        (["data=tokens", "data.corpus.files={folder}/*.npy", "data.vocab_size=9"], "data.end_of_text=null, and token"),
        (["data=tokens", "data.corpus.files={folder}/*.npy"], "data.vocab_size=null has to be given: a whole number"),
        (
            ["data=tokens", "data.corpus.files={folder}/*.npy", "data.vocab_size=9", "data.end_of_text=8"],
            "data.vocab_size=9 is too small for the token ids of data.corpus, which go up to 20: give 21 or more.",
        ),
    ],
)
def test_one_sentence_and_exit_code_2(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "text"}\n')
    np.save(tmp_path / "ids.npy", np.arange(21))
    byte_level(tmp_path)
    done = program.train(
        "debug=fast", *(item.format(folder=tmp_path) for item in arguments), f"runs_dir={tmp_path}/runs"
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert sentence in line
    assert not list(tmp_path.glob("runs/*/*/status.json"))
