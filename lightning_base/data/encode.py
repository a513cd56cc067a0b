"""Writes the tokens of a corpus to disk, a batch of documents at a time."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from tokenizers import Tokenizer

from lightning_base.data.prepared import FORMAT, SPLITS
from lightning_base.data.progress import progress
from lightning_base.data.survey import Entry, Reader, Split
from lightning_base.data.tokenizer import END_OF_TEXT, load_tokenizer, pieces, train_tokenizer

# Text encoded at a time: enough to occupy all cores, little enough to forget.
BATCH_BYTES = 1 << 20

# The largest vocabulary whose tokens fit into two bytes.
UINT16_TOKENS = 1 << 16


def write_corpus(folder: Path, reader: Reader, split: Split, vocab_size: int, bytes_in_corpus: int) -> None:
    """Trains the tokenizer, then writes every file of a prepared corpus into `folder`."""
    entries = progress(reader.entries(), "training the tokenizer", bytes_in_corpus)
    texts = (entry.document.text for entry in entries if split.trains_tokenizer(entry.bucket))
    train_tokenizer(texts, vocab_size).save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    vocab_size = tokenizer.get_vocab_size()
    dtype = "<u2" if vocab_size <= UINT16_TOKENS else "<u4"
    domains: dict[str, int] = {}
    with ExitStack() as stack:
        train, validation = (stack.enter_context(SplitWriter(folder, name, tokenizer, dtype)) for name in SPLITS)
        for batch in batches(progress(reader.entries(), "encoding", bytes_in_corpus)):
            for entry in batch:
                domains.setdefault(entry.document.domain, len(domains))
            train.write([entry for entry in batch if not split.is_validation(entry.bucket)], domains)
            validation.write([entry for entry in batch if split.is_validation(entry.bucket)], domains)
    statistics: dict[str, int | float] = {}
    for name, writer in zip(SPLITS, (train, validation), strict=True):
        statistics[f"{name}_documents"] = writer.documents
        statistics[f"{name}_tokens"] = writer.tokens
        statistics[f"{name}_bytes"] = writer.bytes
    statistics["unigram_entropy"] = cross_entropy(validation.counts_V, train.counts_V + 1)
    statistics["train_unigram_entropy"] = cross_entropy(train.counts_V, train.counts_V)
    description = {
        "format": FORMAT,
        "dtype": dtype,
        "eos_id": tokenizer.token_to_id(END_OF_TEXT),
        "domains": list(domains),
        "statistics": statistics,
    }
    (folder / "corpus.json").write_text(json.dumps(description, indent=2))


class SplitWriter:
    """Appends documents to the three files of one split."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, dtype: str) -> None:
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.eos_id = tokenizer.token_to_id(END_OF_TEXT)
        self.documents, self.tokens, self.bytes = 0, 0, 0
        self.counts_V: Int64[np.ndarray, "V"] = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
        self.paths = [folder / f"{name}.{part}" for part in ("tokens", "offsets", "domains")]

    def __enter__(self) -> "SplitWriter":
        self.files = [path.open("wb") for path in self.paths]
        self.files[1].write(np.zeros(1, dtype="<i8").tobytes())
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()

    def write(self, batch: list[Entry], domains: dict[str, int]) -> None:
        """Encodes and appends; `domains` gives each domain's number."""
        cut = [list(pieces(entry.document.text)) for entry in batch]
        encodings = iter(self.tokenizer.encode_batch_fast([piece for texts in cut for piece in texts]))
        for entry, texts in zip(batch, cut, strict=True):
            ids = [np.asarray(next(encodings).ids, dtype=self.dtype) for _ in texts]
            document = np.concatenate([*ids, np.asarray([self.eos_id], dtype=self.dtype)])
            self.counts_V += np.bincount(document, minlength=len(self.counts_V))
            self.documents += 1
            self.tokens += len(document)
            self.bytes += entry.size
            domain = domains[entry.document.domain]
            rows = (document, np.asarray([self.tokens], dtype="<i8"), np.asarray([domain], dtype="<i4"))
            for file, row in zip(self.files, rows, strict=True):
                file.write(row.tobytes())


def batches(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Consecutive documents of about `BATCH_BYTES` together."""
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += entry.size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def cross_entropy(counts_V: Int64[np.ndarray, "V"], model_counts_V: Int64[np.ndarray, "V"]) -> float:
    """Mean of -ln q over the counted tokens, in nats, where q are the model's frequencies."""
    seen_V = counts_V > 0
    log_q_V = np.log(model_counts_V[seen_V]) - np.log(model_counts_V.sum())
    return float(-(counts_V[seen_V] * log_q_V).sum() / counts_V.sum())
