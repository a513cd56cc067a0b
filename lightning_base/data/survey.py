"""The first reading of a corpus: a hash of its content, and how much text there is on each side of any split.

A document's *bucket* is the first 20 bits of the SHA-256 of its text, or of its token ids as 32-bit integers. Splitting
is choosing a bucket: everything below is validation. So a document's side depends on its own content and on no other
document's place in the list, two copies of one text never end up on both sides, and the sizes of the sides are known
from a table of fixed size, however many documents there are.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from lightning_base.data.corpus import Corpus, CorpusError, Document, TokenDocument
from lightning_base.data.progress import progress

BUCKET_BITS = 20
BUCKETS = 1 << BUCKET_BITS


# Ids are hashed as these, whatever type they come in.
ID = np.dtype("<u4")


class Entry(NamedTuple):
    """A document that holds anything, its size in bytes of UTF-8 or of 32-bit ids, and its bucket."""

    document: Document | TokenDocument
    size: int
    bucket: int


class Reader:
    """Reads a corpus from end to end, any number of times, and notices when its content changes in between.

    Attributes:
        content: a hash of every document, after a whole reading.
        kind: what the documents are, after the first.
        largest_id: of all token ids read so far.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.content: str | None = None
        self.kind: type | None = None
        self.largest_id = -1

    def entries(self) -> Iterator[Entry]:
        """The documents that hold anything.

        Raises:
            CorpusError: a text is not Unicode, ids are negative, some documents are of text and some of ids, or this
                reading differs from the one before.
        """
        content = hashlib.sha256()
        for document in self.corpus.documents():
            if not len(document[2]):
                continue
            if self.kind not in (None, type(document)):
                held = "text" if isinstance(document, Document) else "token ids"
                raise CorpusError(
                    f"data.corpus: document {document.name} holds {held}, and those before it do not: give documents "
                    "that are all of text, or all of token ids."
                )
            self.kind = type(document)
            raw = self._bytes(document)
            digest = hashlib.sha256(raw).digest()
            for part in (document.name.encode("utf-8", "surrogateescape"), document.domain.encode(), digest):
                content.update(len(part).to_bytes(8, "little") + part)
            bucket = int.from_bytes(digest[:4], "big") >> (32 - BUCKET_BITS)
            yield Entry(document, len(raw), bucket)
        if self.content not in (None, content.hexdigest()):
            raise CorpusError("data.corpus changed while it was being read: start again when nothing writes to it.")
        self.content = content.hexdigest()

    def _bytes(self, document: Document | TokenDocument) -> bytes:
        """What a document holds, for its hash."""
        if isinstance(document, TokenDocument):
            if (least := int(document.ids.min())) < 0:
                raise CorpusError(f"data.corpus: document {document.name} holds {least}, which is no token id.")
            self.largest_id = max(self.largest_id, int(document.ids.max()))
            return document.ids.astype(ID).tobytes()
        try:
            return document.text.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"data.corpus: document {document.name} holds half of a surrogate pair at character {error.start}: "
                "give text that can be written as UTF-8."
            ) from None


class Survey(NamedTuple):
    """What one reading finds: the hash of every document, and the bytes in each bucket."""

    content: str
    documents: int
    bytes_per_bucket: Int64[np.ndarray, "buckets"]


def survey(reader: Reader) -> Survey:
    """Reads the corpus once.

    Raises:
        CorpusError: there is nothing in it.
    """
    documents = 0
    bytes_per_bucket = np.zeros(BUCKETS, dtype=np.int64)
    for entry in progress(reader.entries(), "reading the corpus"):
        documents += 1
        bytes_per_bucket[entry.bucket] += entry.size
    if not documents or reader.content is None:
        raise CorpusError("data.corpus holds no text at all, and no ids: give files or rows that are not empty.")
    return Survey(reader.content, documents, bytes_per_bucket)


class Split(NamedTuple):
    """Buckets below `validation_below` are validation; the tokenizer learns from those up to `tokenizer_below`."""

    validation_below: int
    tokenizer_below: int

    def is_validation(self, bucket: int) -> bool:
        return bucket < self.validation_below

    def trains_tokenizer(self, bucket: int) -> bool:
        return self.validation_below <= bucket < self.tokenizer_below


def choose_split(found: Survey, validation_fraction: float, tokenizer_bytes: int) -> Split:
    """The split whose validation side is nearest to the wished fraction of bytes, with some text on both sides.

    Args:
        found: the survey of the corpus.
        validation_fraction: wished share of the bytes, between 0 and 1.
        tokenizer_bytes: how much training text the tokenizer may learn from; whole buckets, at least one.

    Raises:
        CorpusError: there are not two different documents to split.
    """
    filled = np.flatnonzero(found.bytes_per_bucket)
    if len(filled) < 2:
        raise CorpusError(
            f"data.corpus holds {found.documents} document(s) with one and the same content, which cannot be split "
            "into train and validation: give at least two different documents."
        )
    below = np.cumsum(found.bytes_per_bucket[filled])  # bytes up to and including each filled bucket
    last = int(np.abs(below[:-1] - validation_fraction * below[-1]).argmin())
    enough = int(np.searchsorted(below, below[last] + tokenizer_bytes, side="right"))
    return Split(
        validation_below=int(filled[last]) + 1,
        tokenizer_below=int(filled[min(max(enough - 1, last + 1), len(filled) - 1)]) + 1,
    )
