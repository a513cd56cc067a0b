import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from synthetic_corpora import ListCorpus, make_documents

from lightning_base.data import CorpusError, Document, PreparedCorpus, TokenSplit, prepare


def texts(prepared: PreparedCorpus, split: TokenSplit) -> list[str]:
    """Every document of a split, decoded from its tokens."""
    tokenizer = prepared.tokenizer()
    bounds = zip(split.offsets[:-1], split.offsets[1:], strict=True)
    documents = [split.tokens[start:stop].tolist() for start, stop in bounds]
    assert all(document[-1] == prepared.eos_id and prepared.eos_id not in document[:-1] for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def test_every_document_is_written_back_exactly_and_on_one_side(corpus: ListCorpus, tmp_path: Path) -> None:
    prepared = prepare(corpus, vocab_size=300, cache_dir=tmp_path)
    train, validation = texts(prepared, prepared.train), texts(prepared, prepared.validation)
    assert train
    assert validation
    assert sorted(train + validation) == sorted(document.text for document in corpus.list)
    # In each split documents keep the order of the corpus.
    order = {document.text: place for place, document in enumerate(corpus.list)}
    for split in (train, validation):
        assert [order[text] for text in split] == sorted(order[text] for text in split)


def test_each_document_keeps_its_domain(corpus: ListCorpus, tmp_path: Path) -> None:
    prepared = prepare(corpus, vocab_size=300, cache_dir=tmp_path)
    domain = {document.text: document.domain for document in corpus.list}
    assert prepared.domains == ["domain 0", "domain 1", "domain 2"]
    for split in (prepared.train, prepared.validation):
        found = [prepared.domains[index] for index in split.domain_of_document]
        assert found == [domain[text] for text in texts(prepared, split)]


def test_bytes_per_token_add_up_to_the_bytes_of_the_text(corpus: ListCorpus, tmp_path: Path) -> None:
    prepared = prepare(corpus, vocab_size=300, cache_dir=tmp_path)
    assert prepared.bytes_per_token.shape == (prepared.vocab_size,) == (300,)
    assert prepared.bytes_per_token[prepared.eos_id] == 0
    for name, split in (("train", prepared.train), ("validation", prepared.validation)):
        size = sum(len(text.encode()) for text in texts(prepared, split))
        assert prepared.bytes_per_token[split.tokens].sum() == prepared.statistics[f"{name}_bytes"] == size
        assert prepared.statistics[f"{name}_tokens"] == len(split.tokens) == split.offsets[-1]
        assert prepared.statistics[f"{name}_documents"] == split.documents == len(texts(prepared, split))


def test_unigram_entropies_are_those_of_the_token_counts(corpus: ListCorpus, tmp_path: Path) -> None:
    prepared = prepare(corpus, vocab_size=300, cache_dir=tmp_path)
    train, validation = Counter(prepared.train.tokens.tolist()), prepared.validation.tokens.tolist()
    smoothed = sum(train.values()) + prepared.vocab_size
    cross = -sum(math.log((train[token] + 1) / smoothed) for token in validation) / len(validation)
    total = sum(train.values())
    plain = -sum(count / total * math.log(count / total) for count in train.values())
    assert prepared.statistics["unigram_entropy"] == pytest.approx(cross)
    assert prepared.statistics["train_unigram_entropy"] == pytest.approx(plain)


def test_the_split_depends_on_the_documents_and_not_on_their_order(tmp_path: Path) -> None:
    documents = make_documents(120)
    one = prepare(ListCorpus(documents), vocab_size=300, cache_dir=tmp_path)
    other = prepare(ListCorpus(documents[::-1]), vocab_size=300, cache_dir=tmp_path)
    assert one.folder != other.folder
    assert one.fingerprint != other.fingerprint
    assert set(texts(one, one.validation)) == set(texts(other, other.validation))


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.3, 0.999])
def test_the_split_is_within_one_document_of_the_wished_share_of_bytes(tmp_path: Path, fraction: float) -> None:
    documents = make_documents(120)
    prepared = prepare(ListCorpus(documents), vocab_size=300, validation_fraction=fraction, cache_dir=tmp_path)
    sizes = [len(document.text.encode()) for document in documents]
    assert prepared.train.documents
    assert prepared.validation.documents
    assert abs(prepared.statistics["validation_bytes"] - fraction * sum(sizes)) <= max(sizes)


def test_copies_of_one_text_are_on_one_side(tmp_path: Path) -> None:
    documents = [
        document._replace(name=f"{document.name} {copy}") for copy in range(3) for document in make_documents(40)
    ]
    prepared = prepare(ListCorpus(documents), vocab_size=300, validation_fraction=0.3, cache_dir=tmp_path)
    assert not set(texts(prepared, prepared.train)) & set(texts(prepared, prepared.validation))


def test_a_text_that_mentions_the_end_of_text_does_not_end_there(tmp_path: Path) -> None:
    documents = [Document(str(i), "d", f"before <|endoftext|> after {i}") for i in range(8)]
    prepared = prepare(ListCorpus(documents), vocab_size=257, cache_dir=tmp_path)
    assert sorted(texts(prepared, prepared.train) + texts(prepared, prepared.validation)) == [d.text for d in documents]


def test_a_long_text_is_encoded_in_pieces_and_stays_one_document(tmp_path: Path) -> None:
    long = "".join(f"line {i} of a long text\n" for i in range(40_000)) + "é" * 400_000
    documents = [Document("long", "d", long), *make_documents(3)]
    prepared = prepare(ListCorpus(documents), vocab_size=300, validation_fraction=0.5, cache_dir=tmp_path)
    assert sorted(texts(prepared, prepared.train) + texts(prepared, prepared.validation)) == sorted(
        document.text for document in documents
    )


def test_a_large_vocabulary_takes_four_bytes_a_token(corpus: ListCorpus, tmp_path: Path, monkeypatch) -> None:
    prepared = prepare(corpus, vocab_size=300, cache_dir=tmp_path / "two")
    assert prepared.train.tokens.dtype == np.uint16
    monkeypatch.setattr("lightning_base.data.encode.UINT16_TOKENS", 299)
    wide = prepare(corpus, vocab_size=300, cache_dir=tmp_path / "four")
    assert wide.train.tokens.dtype == np.uint32
    assert wide.train.tokens.tolist() == prepared.train.tokens.tolist()


def test_what_was_prepared_once_is_opened_and_not_made_again(corpus: ListCorpus, tmp_path: Path) -> None:
    one = prepare(corpus, vocab_size=300, cache_dir=tmp_path)
    made = (one.folder / "train.tokens").stat()
    again = prepare(corpus, vocab_size=300, cache_dir=tmp_path)
    assert (again.folder, again.fingerprint) == (one.folder, one.fingerprint)
    assert (again.folder / "train.tokens").stat().st_mtime_ns == made.st_mtime_ns


def test_text_settings_and_names_each_have_a_cache_of_their_own(tmp_path: Path) -> None:
    documents = make_documents(60)
    renamed = [documents[0]._replace(domain="elsewhere"), *documents[1:]]
    longer = [documents[0]._replace(text=documents[0].text + "!"), *documents[1:]]
    folders = {
        prepare(ListCorpus(documents), vocab_size=300, cache_dir=tmp_path).folder,
        prepare(ListCorpus(renamed), vocab_size=300, cache_dir=tmp_path).folder,
        prepare(ListCorpus(longer), vocab_size=300, cache_dir=tmp_path).folder,
        prepare(ListCorpus(documents), vocab_size=301, cache_dir=tmp_path).folder,
        prepare(ListCorpus(documents), vocab_size=300, validation_fraction=0.4, cache_dir=tmp_path).folder,
    }
    assert len(folders) == 5


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "sidecar", "empty sidecar"])
def test_a_damaged_cache_is_found_and_made_again(corpus: ListCorpus, tmp_path: Path, damage: str) -> None:
    one = prepare(corpus, vocab_size=300, cache_dir=tmp_path)
    before = one.train.tokens.tolist()
    file = one.folder / "train.tokens"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[100] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-2])
    elif damage == "remove":
        file.unlink()
    else:
        (one.folder / "checksums.json").write_text("{" if damage == "sidecar" else "{}")
    again = prepare(corpus, vocab_size=300, cache_dir=tmp_path)
    assert again.fingerprint == one.fingerprint
    assert again.train.tokens.tolist() == before
    assert not list(tmp_path.glob("*.partial*"))


def test_the_rubble_of_a_killed_process_is_cleared(corpus: ListCorpus, tmp_path: Path) -> None:
    name = prepare(corpus, vocab_size=300, cache_dir=tmp_path / "elsewhere").folder.name
    rubble = tmp_path / f"{name}.partial-12345"
    rubble.mkdir()
    (rubble / "train.tokens").write_bytes(b"half")
    prepare(corpus, vocab_size=300, cache_dir=tmp_path)
    assert not rubble.exists()


def test_a_failure_half_way_leaves_nothing_behind(corpus: ListCorpus, tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> float:
        raise RuntimeError("stopped")

    monkeypatch.setattr("lightning_base.data.encode.cross_entropy", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        prepare(corpus, vocab_size=300, cache_dir=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] in ([], [".lock"])


def test_the_tokenizer_learns_from_training_documents_only(tmp_path: Path) -> None:
    common = make_documents(60)
    found = prepare(ListCorpus(common), vocab_size=280, validation_fraction=0.2, cache_dir=tmp_path)
    validation = set(texts(found, found.validation))
    # Doubling what is said in validation must not change the vocabulary, though it does change every frequency.
    copies = [d._replace(name=f"{d.name} again") for d in common if d.text in validation]
    share = 2 * found.statistics["validation_bytes"]
    share /= share + found.statistics["train_bytes"]
    more = prepare(ListCorpus(common + copies), vocab_size=280, validation_fraction=share, cache_dir=tmp_path)
    assert set(texts(more, more.validation)) == validation
    assert more.statistics["validation_documents"] == 2 * found.statistics["validation_documents"]
    assert more.tokenizer().get_vocab() == found.tokenizer().get_vocab()


PREPARE_AND_COUNT = """
import sys
from pathlib import Path
from lightning_base.data import TextFiles, prepare

class Counted(TextFiles):
    def documents(self):
        with Path(sys.argv[2]).open("a") as log:
            log.write("read\\n")
        yield from super().documents()

print(prepare(Counted(sys.argv[1]), vocab_size=400, cache_dir=sys.argv[3]).fingerprint)
"""


def test_processes_that_prepare_at_once_build_once_and_agree(tmp_path: Path) -> None:
    for document in make_documents(200):
        (tmp_path / f"{document.name}.txt").write_text(document.text)
    arguments = [f"{tmp_path}/*.txt", str(tmp_path / "log"), str(tmp_path / "cache")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE_AND_COUNT, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    # One reading each to find the hash; two more, to train the tokenizer and to encode, by the one that built.
    assert (tmp_path / "log").read_text().count("read") == 5
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


GROWTH = """
import resource, sys
import numpy as np
from lightning_base.data import Document, prepare

class Synthetic:
    def __init__(self, count):
        self.count = count
    def documents(self):
        words = np.array([f"word{i}" for i in range(3000)])
        for i in range(self.count):
            random = np.random.default_rng(i)
            yield Document(str(i), "d", " ".join(words[random.integers(0, 3000, 2000)]))

def peak(count):
    prepare(Synthetic(count), vocab_size=2000, cache_dir=sys.argv[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

small = peak(int(sys.argv[2]))
print(peak(int(sys.argv[3])) - small)
"""


# 1.5 MB of text, then 6.5 MB: holding the second would take 5 MB more as text and 15 MB more as lists of tokens.
# 3 MB and 19 MB: 16 and 50.
@pytest.mark.parametrize(
    ("few", "many", "limit"), [(100, 400, 8), pytest.param(200, 1200, 20, marks=pytest.mark.exhaustive)]
)
def test_memory_does_not_grow_with_the_corpus(few: int, many: int, limit: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path), str(few), str(many)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert float(done.stdout) < limit


@pytest.mark.parametrize(
    ("documents", "arguments", "sentence"),
    [
        ([], {}, "data.corpus holds no text at all"),
        ([Document("a", "d", "")], {}, "data.corpus holds no text at all"),
        ([Document("a", "d", "one")], {}, "data.corpus holds 1 document.* at least two different documents"),
        ([Document("a", "d", "one"), Document("b", "d", "one")], {}, "holds 2 document.* one and the same content"),
        ([Document("a", "d", "\ud800")], {}, "document a holds half of a surrogate pair at character 0"),
        (make_documents(5), {"vocab_size": 256}, "data.vocab_size=256 .* give 257 or more"),
        (make_documents(5), {"validation_fraction": 0.0}, "data.validation_fraction=0.0 .* between 0 and 1"),
        (make_documents(5), {"validation_fraction": 1.0}, "data.validation_fraction=1.0 .* between 0 and 1"),
    ],
)
def test_what_cannot_be_prepared_is_said_in_one_sentence(
    tmp_path: Path, documents: list[Document], arguments: dict, sentence: str
) -> None:
    with pytest.raises(CorpusError, match=sentence) as error:
        prepare(ListCorpus(documents), cache_dir=tmp_path, **arguments)
    assert "\n" not in str(error.value)


def test_a_corpus_that_changes_between_readings_is_refused(tmp_path: Path) -> None:
    class Growing:
        readings = 0

        def documents(self):
            self.readings += 1
            yield from make_documents(20 + self.readings)

    with pytest.raises(CorpusError, match=r"data\.corpus changed while it was being read"):
        prepare(Growing(), vocab_size=300, cache_dir=tmp_path)


def test_a_process_that_prepares_for_ever_is_not_waited_for_for_ever(corpus: ListCorpus, tmp_path: Path) -> None:
    name = prepare(corpus, vocab_size=300, cache_dir=tmp_path / "elsewhere").folder.name
    held = FileLock(tmp_path / f"{name}.lock")
    with (
        held,
        pytest.raises(CorpusError, match=r"^data\.cache_dir=.*: another process has been preparing .* wait for it"),
    ):
        prepare(corpus, vocab_size=300, cache_dir=tmp_path, lock_timeout=0.05)


def test_a_cache_folder_that_cannot_be_written_is_named(corpus: ListCorpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match=r"data\.cache_dir=.*file/below cannot be written to"):
        prepare(corpus, vocab_size=300, cache_dir=tmp_path / "file" / "below")
