"""What a corpus is: documents in a fixed order, each with a name and a domain."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import NamedTuple, Protocol, runtime_checkable


class CorpusError(ValueError):
    """Input that cannot be trained on. The message is one sentence: the key, what it was given, what would do."""


class Document(NamedTuple):
    """One text: where it came from, the domain it is counted under, and the text itself."""

    name: str
    domain: str
    text: str


@runtime_checkable
class Corpus(Protocol):
    """A source of documents. Adding one is a class with this method and a file in `conf/data/`."""

    def documents(self) -> Iterator[Document]:
        """The documents, in the same order with the same content every time it is called.

        A corpus is read up to three times (hash, tokenizer, tokens) and should hold one document at a time.

        Raises:
            CorpusError: the input is missing, unreadable or not text.
        """
        ...


def missing_column(key: str, column: str, available: Iterable[str], where: str) -> CorpusError:
    """The error for a column that is not there, with the nearest names first."""
    names = sorted(available)
    nearest = get_close_matches(column, names, n=3, cutoff=0.5)
    choices = f"did you mean {' or '.join(nearest)}?" if nearest else f"it has {', '.join(names) or 'no columns'}."
    return CorpusError(f"{key}={column} is not a column of {where}: {choices}")
