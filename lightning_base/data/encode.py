"""Writes the tokens of a corpus to disk, a batch of documents at a time."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt
from tokenizers import Tokenizer

from lightning_base.data.corpus import Document, TokenDocument
from lightning_base.data.prepared import FORMAT, SPLITS, TOKENIZER
from lightning_base.data.progress import progress
from lightning_base.data.survey import Entry, Reader, Split
from lightning_base.data.tokenizer import (
    END_OF_TEXT,
    bytes_per_token,
    is_byte_level,
    load_tokenizer,
    pieces,
    size_of,
    train_tokenizer,
)
from lightning_base.data.vocabulary import Vocabulary

# Text encoded at a time: enough to occupy all cores, little enough to forget.
BATCH_BYTES = 1 << 20

# The largest vocabulary whose tokens fit into two bytes.
UINT16_TOKENS = 1 << 16


def write_corpus(folder: Path, reader: Reader, split: Split, vocabulary: Vocabulary, bytes_in_corpus: int) -> None:
    """Learns the tokenizer where none is given, then writes every file of a prepared corpus into `folder`."""
    if vocabulary.file is not None:
        shutil.copyfile(vocabulary.file, folder / TOKENIZER)
    elif reader.kind is Document:
        entries = progress(reader.entries(), "training the tokenizer", bytes_in_corpus)
        texts = (
            e.document.text for e in entries if isinstance(e.document, Document) and split.trains_tokenizer(e.bucket)
        )
        train_tokenizer(texts, vocabulary.size).save(str(folder / TOKENIZER))
    tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).exists() else None
    size = vocabulary.size if tokenizer is None else size_of(tokenizer)
    eos_id = vocabulary.end_of_text
    if eos_id is None and tokenizer is not None:
        eos_id = tokenizer.token_to_id(END_OF_TEXT)
    assert eos_id is not None
    domains: dict[str, int] = {}
    with ExitStack() as stack:
        train, validation = (stack.enter_context(SplitWriter(folder, name, tokenizer, size, eos_id)) for name in SPLITS)
        for batch in batches(progress(reader.entries(), "encoding", bytes_in_corpus)):
            for entry in batch:
                domains.setdefault(entry.document.domain, len(domains))
            train.write([entry for entry in batch if not split.is_validation(entry.bucket)], domains)
            validation.write([entry for entry in batch if split.is_validation(entry.bucket)], domains)
    statistics: dict[str, int | float] = {}
    for name, writer in zip(SPLITS, (train, validation), strict=True):
        statistics[f"{name}_documents"] = writer.documents
        statistics[f"{name}_tokens"] = writer.tokens
        if reader.kind is Document:
            statistics[f"{name}_bytes"] = writer.bytes
    statistics["unigram_entropy"] = cross_entropy(validation.counts_V, train.counts_V + 1)
    statistics["train_unigram_entropy"] = cross_entropy(train.counts_V, train.counts_V)
    bytes_known = train.bytes_agree and validation.bytes_agree
    if tokenizer is None or reader.kind is not Document:  # no text to hold the tokens against
        bytes_known = tokenizer is not None and is_byte_level(tokenizer)
    description = {
        "format": FORMAT,
        "dtype": train.dtype,
        "vocab_size": size,
        "eos_id": eos_id,
        "bytes_known": bytes_known,
        "domains": list(domains),
        "statistics": statistics,
    }
    (folder / "corpus.json").write_text(json.dumps(description, indent=2))


class SplitWriter:
    """Appends documents to the three files of one split.

    Attributes:
        dtype: of the tokens.
        bytes_agree: whether the tokens of every text so far stand for as many bytes as it has.
    """

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer | None, vocab_size: int, eos_id: int) -> None:
        self.tokenizer = tokenizer
        self.dtype = "<u2" if vocab_size <= UINT16_TOKENS else "<u4"
        self.eos_id = eos_id
        self.documents, self.tokens, self.bytes = 0, 0, 0
        self.counts_V: Int64[np.ndarray, "V"] = np.zeros(vocab_size, dtype=np.int64)
        self.bytes_V = None if tokenizer is None else bytes_per_token(tokenizer, eos_id)
        self.bytes_agree = True
        self.paths = [folder / f"{name}.{part}" for part in ("tokens", "offsets", "domains")]

    def __enter__(self) -> "SplitWriter":
        self.files = [path.open("wb") for path in self.paths]
        self.files[1].write(np.zeros(1, dtype="<i8").tobytes())
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()

    def write(self, batch: list[Entry], domains: dict[str, int]) -> None:
        """Encodes what is text, and appends; `domains` gives each domain's number."""
        if not batch:
            return
        documents = list(self._encoded(batch))
        tokens_n = np.concatenate(documents)
        ends_d = np.cumsum([len(document) for document in documents])
        sizes_d = np.asarray([entry.size for entry in batch])
        if self.bytes_V is not None and isinstance(batch[0].document, Document):
            found_d = np.add.reduceat(self.bytes_V[tokens_n], np.concatenate([[0], ends_d[:-1]]))
            self.bytes_agree &= bool((found_d == sizes_d).all())
        domains_d = [domains[entry.document.domain] for entry in batch]
        rows = (tokens_n, (ends_d + self.tokens).astype("<i8"), np.asarray(domains_d, dtype="<i4"))
        for file, row in zip(self.files, rows, strict=True):
            file.write(row.tobytes())
        self.counts_V += np.bincount(tokens_n, minlength=len(self.counts_V))
        self.documents += len(documents)
        self.tokens += len(tokens_n)
        self.bytes += int(sizes_d.sum())

    def _encoded(self, batch: list[Entry]) -> Iterator[UInt[np.ndarray, "n"]]:
        """The tokens of each document, with one end of text behind them."""
        cut = [list(pieces(e.document.text)) if isinstance(e.document, Document) else [] for e in batch]
        flat = [piece for texts in cut for piece in texts]
        encodings = iter(self.tokenizer.encode_batch_fast(flat, add_special_tokens=False) if self.tokenizer else ())
        end = np.asarray([self.eos_id], dtype=self.dtype)
        for entry, texts in zip(batch, cut, strict=True):
            if isinstance(entry.document, TokenDocument):
                ids = entry.document.ids
                yield np.concatenate([ids[:-1] if ids[-1] == self.eos_id else ids, end]).astype(self.dtype)
            else:
                yield np.concatenate([*(np.asarray(next(encodings).ids, dtype=self.dtype) for _ in texts), end])


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
