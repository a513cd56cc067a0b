"""Corpora and token files made by hand, for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lightning_base.data import Document, TokenSplit

WORDS = ("expert", "router", "token", "gate", "load", "balance", "assign", "dispatch", "combine", "capacity", "switch")


class ListCorpus:
    """Documents from a list."""

    def __init__(self, documents: list[Document]) -> None:
        self.list = documents

    def documents(self) -> Iterator[Document]:
        yield from self.list


def make_documents(count: int, seed: int = 0, words: int = 60) -> list[Document]:
    """Different documents of different lengths in three domains."""
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(WORDS, random.integers(1, words))) for _ in range(count)]
    return [Document(f"document {i}", f"domain {i % 3}", f"{text} {i} é\n") for i, text in enumerate(texts)]


def write_split(folder: Path, documents: list[list[int]]) -> TokenSplit:
    """A split with exactly these tokens, where 0 is the end of text."""
    offsets = np.cumsum([0] + [len(document) for document in documents])
    np.concatenate(documents).astype("<u2").tofile(folder / "hand.tokens")
    offsets.astype("<i8").tofile(folder / "hand.offsets")
    np.zeros(len(documents), dtype="<i4").tofile(folder / "hand.domains")
    return TokenSplit(folder, "hand", "<u2", 0)
