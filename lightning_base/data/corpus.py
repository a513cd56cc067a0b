"""What a corpus is: documents in a fixed order, each with a name and a domain; of text, or of token ids already."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

COLUMN_KEY = "data.corpus.column"


class CorpusError(ValueError):
    """Input that cannot be trained on. The message is one sentence: the key, what it was given, what would do."""


class Document(NamedTuple):
    """One text: where it came from, the domain it is counted under, and the text itself."""

    name: str
    domain: str
    text: str


class TokenDocument(NamedTuple):
    """A document that has been tokenised already: its ids, with or without the end of text behind them."""

    name: str
    domain: str
    ids: Integer[np.ndarray, "n"]


@runtime_checkable
class Corpus(Protocol):
    """A source of documents, all of text or all of token ids.

    Adding one is a class with this method and a file in `conf/data/`. A class that has to know which token ends a
    document takes an argument `end_of_text`, and is given `data.end_of_text`.
    """

    def documents(self) -> Iterator[Document | TokenDocument]:
        """The documents, in the same order with the same content every time it is called.

        A corpus is read up to three times (hash, tokenizer, tokens) and should hold one document at a time.

        Raises:
            CorpusError: the input is missing, unreadable or not text.
        """
        ...


def row_document(name: str, domain: str, value: object, column: str, where: str) -> Document | TokenDocument:
    """A document from one value of a column: a text, or a list of token ids.

    Raises:
        CorpusError: it is neither.
    """
    if isinstance(value, str):
        return Document(name, domain, value)
    if isinstance(value, list):
        with suppress(ValueError, OverflowError):  # lists of unequal lengths; numbers that are no ids
            ids = np.asarray(value, dtype=None if value else np.int64)
            if ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer):
                return TokenDocument(name, domain, ids)
    raise CorpusError(
        f"{COLUMN_KEY}={column} holds a {type(value).__name__} in {where}: name a column of text, or of lists of "
        "token ids."
    )


def missing_column(key: str, column: str, available: Iterable[str], where: str) -> CorpusError:
    """The error for a column that is not there, with the nearest names first."""
    names = sorted(available)
    nearest = get_close_matches(column, names, n=3, cutoff=0.5)
    choices = f"did you mean {' or '.join(nearest)}?" if nearest else f"it has {', '.join(names) or 'no columns'}."
    return CorpusError(f"{key}={column} is not a column of {where}: {choices}")
