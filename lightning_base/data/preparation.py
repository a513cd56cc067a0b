"""From a corpus to token files, once: the result is cached under a hash of everything that went into it."""

import hashlib
import json
from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning_base.data.cache import build_once
from lightning_base.data.corpus import Corpus, CorpusError, Document
from lightning_base.data.encode import write_corpus
from lightning_base.data.prepared import FORMAT, PreparedCorpus
from lightning_base.data.sequences import SequenceDataset, check_sequences
from lightning_base.data.survey import Reader, choose_split, survey
from lightning_base.data.tokenizer import untrained_tokenizer
from lightning_base.data.vocabulary import (
    END_KEY,
    SIZE_KEY,
    TOKENIZER_KEY,
    Vocabulary,
    find_vocabulary,
    needs_end_of_text,
)


@runtime_checkable
class RunSettings(Protocol):
    """What decides whether a corpus is enough for a run: the options of ``conf/data/``."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def tokenizer(self) -> str | None: ...
    @property
    def end_of_text(self) -> str | int | None: ...
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
        tokenizer=run.tokenizer,
        end_of_text=run.end_of_text,
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


def described(prepared: PreparedCorpus, run: RunSettings) -> list[str]:
    """What a person at the terminal wants to know of a corpus, a sentence each."""
    statistics = prepared.statistics
    lines = [
        f"{statistics['train_tokens']:,} tokens to train on, {statistics['validation_tokens']:,} to validate on, "
        f"cached in {prepared.folder}"
    ]
    file = find_vocabulary(run.vocab_size, run.tokenizer, run.end_of_text).file
    if file is not None:
        lines.append(f"{SIZE_KEY}={run.vocab_size}, with the {prepared.vocab_size:,} tokens of {file}")
    if prepared.bytes_per_token is None:
        lines.append(f"without bits per byte, since {why_without_bytes(prepared)}")
    return lines


def prepare(
    corpus: Corpus,
    *,
    vocab_size: int = 4096,
    tokenizer: str | Path | None = None,
    end_of_text: str | int | None = None,
    validation_fraction: float = 0.05,
    cache_dir: str | Path,
    tokenizer_bytes: int = 64 << 20,
    lock_timeout: float = 3600.0,
) -> PreparedCorpus:
    """The corpus as tokens, split into train and validation by document.

    Reads the corpus once to find its hash; where the cache does not hold that hash yet, once more to write its tokens,
    and before that, to train a byte-level BPE tokenizer on the training documents if it is text and no tokenizer is
    given. Memory does not grow with the corpus.
    Safe to call from several processes at once: one builds, the others wait.

    Args:
        corpus: where the documents come from.
        vocab_size: tokens in the vocabulary, the end of text included; with a tokenizer of one's own at least as many
            as it has, and of one that is learnt at most so many, with the 256 bytes.
        tokenizer: a ``tokenizer.json`` of one's own, or a folder with one; None learns one from text.
        end_of_text: the token that ends a document: an id, or its name in that tokenizer; see ``find_vocabulary``.
        validation_fraction: wished share of the corpus, in bytes, to hold out; whole documents.
        cache_dir: the folder of caches; this corpus gets a folder of its own in it.
        tokenizer_bytes: the tokenizer learns from about this much training text; all of it in smaller corpora.
        lock_timeout: seconds to wait for another process that prepares the same corpus.

    Raises:
        CorpusError: the corpus or the settings cannot be used, in one sentence that names the key.
    """
    vocabulary = find_vocabulary(vocab_size, tokenizer, end_of_text)
    if not 0 < validation_fraction < 1:
        raise CorpusError(
            f"data.validation_fraction={validation_fraction} leaves nothing to train on or nothing to validate on: "
            "give a number between 0 and 1, such as 0.05."
        )
    reader = Reader(corpus)
    found = survey(reader)
    check_kind(reader, vocabulary)
    split = choose_split(found, validation_fraction, tokenizer_bytes)
    learnt = vocabulary.end_of_text is None
    settings = {
        "format": FORMAT,
        "content": found.content,
        "tokenizer": untrained_tokenizer().to_str() if learnt else vocabulary.sha256,
        "vocab_size": vocabulary.size,
        "end_of_text": vocabulary.end_of_text,
        "split": split._asdict() if learnt else split.validation_below,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(cache_dir).expanduser().resolve() / key
    corpus_bytes = int(found.bytes_per_bucket.sum())
    build_once(folder, lambda empty: write_corpus(empty, reader, split, vocabulary, corpus_bytes), lock_timeout)
    return PreparedCorpus(folder)


def check_kind(reader: Reader, vocabulary: Vocabulary) -> None:
    """Whether what is known of the tokens is enough for what a corpus was found to hold, and no more than that.

    Raises:
        CorpusError: it is not.
    """
    if reader.kind is Document:
        if vocabulary.file is None and vocabulary.end_of_text is not None:
            raise CorpusError(
                f"{END_KEY}={vocabulary.end_of_text} is for token ids, or goes with {TOKENIZER_KEY}, and data.corpus "
                "holds text: leave it null for a tokenizer that is learnt."
            )
        return
    if vocabulary.end_of_text is None:
        raise needs_end_of_text()
    if reader.largest_id >= vocabulary.size:
        whose = f" of {vocabulary.file}" if vocabulary.file else ""
        remedy = (
            "give the tokenizer they were made with" if vocabulary.file else f"give {reader.largest_id + 1} or more"
        )
        raise CorpusError(
            f"{SIZE_KEY}={vocabulary.size}{whose} is too small for the token ids of data.corpus, which go up to "
            f"{reader.largest_id:,}: {remedy}."
        )


def why_without_bytes(prepared: PreparedCorpus) -> str:
    """What is missing."""
    if prepared.tokenizer_sha256 is None:
        return f"only a byte-level {TOKENIZER_KEY} could say what these token ids stand for"
    if "train_bytes" in prepared.statistics:
        return "the tokens do not stand for all bytes of the text, or for more of them"
    return f"{TOKENIZER_KEY} is not byte-level, and there is no text to hold it against"
