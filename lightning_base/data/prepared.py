"""A prepared corpus on disk: tokens, document boundaries, domains, tokenizer, statistics.

    tokenizer.json                 learnt or given; not there for token ids of which nobody has said what they stand for
    corpus.json                    what was prepared, and its statistics
    checksums.json                 SHA-256 of every other file
    {train,validation}.tokens      [N]   uint16 or uint32, every document followed by the end of text
    {train,validation}.offsets     [D+1] int64, document d is tokens[offsets[d] : offsets[d + 1]]
    {train,validation}.domains     [D]   int32, index into the list of domains

All are plain little-endian arrays, opened by memory map: N is bounded by the disk, not by memory.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt
from tokenizers import Tokenizer

from lightning_base.data.cache import CHECKSUMS
from lightning_base.data.tokenizer import bytes_per_token, load_tokenizer

FORMAT = 2
SPLITS = ("train", "validation")

# What decides the tokens a model sees. The names of the domains do not, so they are not part of the fingerprint.
TOKENIZER = "tokenizer.json"
IDENTITY = (TOKENIZER, *(f"{split}.{part}" for split in SPLITS for part in ("tokens", "offsets")))


class TokenSplit:
    """The documents of one split, one after the other.

    Attributes:
        tokens: [N] every document followed by the end of text.
        offsets: [D+1] document d is `tokens[offsets[d] : offsets[d + 1]]`.
        domain_of_document: [D] index into `PreparedCorpus.domains`.
        eos_id: the token that ends every document.
    """

    tokens: UInt[np.ndarray, "N"]
    offsets: Int64[np.ndarray, "D+1"]
    domain_of_document: Int32[np.ndarray, "D"]

    def __init__(self, folder: Path, name: str, dtype: str, eos_id: int) -> None:
        self._arguments = (folder, name, dtype, eos_id)
        self.eos_id = eos_id
        self.tokens = np.memmap(folder / f"{name}.tokens", dtype=dtype, mode="r")
        self.offsets = np.memmap(folder / f"{name}.offsets", dtype="<i8", mode="r")
        self.domain_of_document = np.memmap(folder / f"{name}.domains", dtype="<i4", mode="r")

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map is a copy of the file: a loader's worker opens it again instead.
        return TokenSplit, self._arguments

    def token_counts(self, vocab_size: int) -> Int64[np.ndarray, "V"]:
        """How often each token occurs, [V]; reads the split once, in blocks."""
        counts_V = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, len(self.tokens), 1 << 24):
            counts_V += np.bincount(self.tokens[start : start + (1 << 24)], minlength=vocab_size)
        return counts_V

    @property
    def documents(self) -> int:
        """D, the number of documents."""
        return len(self.domain_of_document)


class PreparedCorpus:
    """A corpus ready to be trained on.

    Attributes:
        fingerprint: SHA-256 over the tokens and document boundaries of both splits and the tokenizer.
        tokenizer_sha256: of the tokenizer's file; None without one.
        vocab_size: V, the number of tokens there are; at most the number asked for.
        eos_id: the token that ends every document.
        bytes_per_token: [V] bytes of UTF-8 each token stands for; 0 for the end of text. None where nobody knows: for
            token ids without a byte-level tokenizer, and where they do not add up to the bytes of the text.
        domains: the names of the domains.
        statistics: per split `*_documents`, `*_tokens` (with the ends of text) and, of text, `*_bytes`;
            `unigram_entropy`, the cross-entropy in nats of the validation tokens under the frequencies of the training
            tokens with one added to each; `train_unigram_entropy`, the entropy in nats of the training tokens
            themselves.
        train, validation: the two splits.
    """

    def __init__(self, folder: Path) -> None:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        description = json.loads((folder / "corpus.json").read_text())
        self.folder = folder
        self.fingerprint = hashlib.sha256(
            "\n".join(f"{name} {checksums[name]}" for name in IDENTITY if name in checksums).encode()
        ).hexdigest()
        self.domains: list[str] = description["domains"]
        self.statistics: dict[str, int | float] = description["statistics"]
        self.eos_id: int = description["eos_id"]
        tokenizer = self.tokenizer()
        self.tokenizer_sha256: str | None = checksums.get(TOKENIZER)
        self.vocab_size: int = description["vocab_size"]
        self.bytes_per_token: Int64[np.ndarray, "V"] | None = None
        if tokenizer is not None and description["bytes_known"]:
            self.bytes_per_token = bytes_per_token(tokenizer, self.eos_id)
        self.train, self.validation = (TokenSplit(folder, name, description["dtype"], self.eos_id) for name in SPLITS)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, learnt or given; None for token ids that came without one."""
        return load_tokenizer(self.folder / TOKENIZER) if (self.folder / TOKENIZER).exists() else None
