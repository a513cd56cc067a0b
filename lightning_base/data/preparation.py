"""From a corpus to token files, once: the result is cached under a hash of everything that went into it."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning_base.data.cache import build_once
from lightning_base.data.corpus import Corpus, CorpusError
from lightning_base.data.encode import write_corpus
from lightning_base.data.prepared import FORMAT, PreparedCorpus
from lightning_base.data.sequences import SequenceDataset, check_sequences
from lightning_base.data.survey import Reader, choose_split, survey
from lightning_base.data.tokenizer import SMALLEST_VOCABULARY, untrained_tokenizer


@runtime_checkable
class RunSettings(Protocol):
    """What decides whether a corpus is enough for a run: the options of ``conf/data/``."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def validation_fraction(self) -> float: ...
    @property
    def cache_dir(self) -> str | Path: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def packing(self) -> str: ...
    @property
    def global_batch(self) -> int: ...


def prepare_for_run(corpus: Corpus, run: RunSettings) -> PreparedCorpus:
    """``prepare``, with a check that there is enough text for one training batch and one validation sequence.

    Raises:
        CorpusError: the corpus or the settings cannot be used, in one sentence that names the key.
    """
    check_sequences(run.sequence_length, run.packing)
    prepared = prepare(
        corpus,
        vocab_size=run.vocab_size,
        validation_fraction=run.validation_fraction,
        cache_dir=run.cache_dir,
    )
    sequences = len(SequenceDataset(prepared.train, run.sequence_length, run.packing, drop_last=True))
    if sequences < run.global_batch:
        raise CorpusError(
            f"data.corpus is too small: it makes {sequences} training sequences of data.sequence_length="
            f"{run.sequence_length}, and data.global_batch={run.global_batch} asks for more: "
            "give more text, shorter sequences or a smaller batch."
        )
    tokens = len(prepared.validation.tokens)
    if tokens < run.sequence_length:
        raise CorpusError(
            f"data.corpus is too small: data.validation_fraction={run.validation_fraction} leaves {tokens} tokens "
            f"to validate on, less than one sequence of data.sequence_length={run.sequence_length}: "
            "give more text, shorter sequences or a larger fraction."
        )
    return prepared


def prepare(
    corpus: Corpus,
    *,
    vocab_size: int = 4096,
    validation_fraction: float = 0.05,
    cache_dir: str | Path,
    tokenizer_bytes: int = 64 << 20,
    lock_timeout: float = 3600.0,
) -> PreparedCorpus:
    """The corpus as tokens, split into train and validation by document.

    Reads the corpus once to find its hash; where the cache does not hold that hash yet, twice more, to train a
    byte-level BPE tokenizer on the training documents and to encode everything. Memory does not grow with the corpus.
    Safe to call from several processes at once: one builds, the others wait.

    Args:
        corpus: where the documents come from.
        vocab_size: tokens in the vocabulary, the end of text and the 256 bytes included.
        validation_fraction: wished share of the corpus, in bytes, to hold out; whole documents.
        cache_dir: the folder of caches; this corpus gets a folder of its own in it.
        tokenizer_bytes: the tokenizer learns from about this much training text; all of it in smaller corpora.
        lock_timeout: seconds to wait for another process that prepares the same corpus.

    Raises:
        CorpusError: the corpus or the settings cannot be used, in one sentence that names the key.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise CorpusError(
            f"data.vocab_size={vocab_size} cannot hold the 256 bytes and the end of text: "
            f"give {SMALLEST_VOCABULARY} or more."
        )
    if not 0 < validation_fraction < 1:
        raise CorpusError(
            f"data.validation_fraction={validation_fraction} leaves nothing to train on or nothing to validate on: "
            "give a number between 0 and 1, such as 0.05."
        )
    reader = Reader(corpus)
    found = survey(reader)
    split = choose_split(found, validation_fraction, tokenizer_bytes)
    settings = {
        "format": FORMAT,
        "content": found.content,
        "tokenizer": untrained_tokenizer().to_str(),
        "vocab_size": vocab_size,
        "split": split._asdict(),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(cache_dir).expanduser().resolve() / key
    corpus_bytes = int(found.bytes_per_bucket.sum())
    build_once(folder, lambda empty: write_corpus(empty, reader, split, vocab_size, corpus_bytes), lock_timeout)
    prepared = PreparedCorpus(folder)
    statistics = prepared.statistics
    print(
        f"data: {statistics['train_tokens']:,} tokens to train on, {statistics['validation_tokens']:,} to validate on, "
        f"cached in {folder}",
        file=sys.stderr,
    )
    return prepared
