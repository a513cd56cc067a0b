"""Which tokens there are, and which one ends a document: learnt from the text, taken from a tokenizer that is given, or
those of whoever made the token ids."""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from lightning_base.data.corpus import CorpusError
from lightning_base.data.tokenizer import END_OF_TEXT, SMALLEST_VOCABULARY, load_tokenizer, size_of

TOKENIZER_KEY, END_KEY, SIZE_KEY = "data.tokenizer", "data.end_of_text", "data.vocab_size"


class Vocabulary(NamedTuple):
    """What is known of the tokens before any text is read.

    Attributes:
        size: V, at most, where the tokenizer is still to be learnt.
        end_of_text: the id of the token that ends a document; None where the tokenizer is still to be learnt.
        file: the tokenizer that is given.
        sha256: of that file.
    """

    size: int
    end_of_text: int | None = None
    file: Path | None = None
    sha256: str | None = None


def settled(data: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``conf/data/`` with the size and the end of text that the tokenizer has, if one is given.

    Raises:
        CorpusError: it cannot be used.
    """
    if not isinstance(data.get("tokenizer"), str):
        return dict(data)
    found = find_vocabulary(None, data["tokenizer"], data.get("end_of_text"))
    return {**data, "vocab_size": found.size, "end_of_text": found.end_of_text}


def find_vocabulary(
    vocab_size: int | None, tokenizer: str | Path | None = None, end_of_text: str | int | None = None
) -> Vocabulary:
    """What the options say of the tokens.

    Args:
        vocab_size: tokens there may be; None is as many as the tokenizer has.
        tokenizer: a ``tokenizer.json``, or a folder with one.
        end_of_text: the id of the token that ends a document; with a tokenizer its name will do, and None is
            ``<|endoftext|>``.

    Raises:
        CorpusError: options that cannot be used together, in one sentence.
    """
    if tokenizer is not None:
        path = tokenizer_file(tokenizer)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        found = opened(path, sha256)
        if not found.get_vocab_size():
            raise CorpusError(f"{TOKENIZER_KEY}={path} has no tokens: train it first, or give another.")
        size = size_of(found)
        if vocab_size is not None and vocab_size < size:
            raise CorpusError(f"{SIZE_KEY}={vocab_size} is less than the {size:,} tokens of {path}: give {size}.")
        return Vocabulary(size, named_token(found, path, end_of_text), path, sha256)
    assert vocab_size is not None
    if isinstance(end_of_text, str):
        raise CorpusError(
            f"{END_KEY}={end_of_text} names a token, which only {TOKENIZER_KEY} could tell the id of: give that, or "
            "the id."
        )
    if end_of_text is not None and not 0 <= end_of_text < vocab_size:
        raise CorpusError(f"{END_KEY}={end_of_text} is none of the {SIZE_KEY}={vocab_size} ids: give one from 0 on.")
    if end_of_text is None and vocab_size < SMALLEST_VOCABULARY:
        raise CorpusError(
            f"{SIZE_KEY}={vocab_size} cannot hold the 256 bytes and the end of text: "
            f"give {SMALLEST_VOCABULARY} or more."
        )
    return Vocabulary(vocab_size, end_of_text)


def tokenizer_file(given: str | Path) -> Path:
    """The file that holds a tokenizer.

    Raises:
        CorpusError: it is not there.
    """
    path = Path(given).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise CorpusError(f"{TOKENIZER_KEY}={given} is not there: give a tokenizer.json, or a folder that holds one.")
    return path


@cache
def opened(path: Path, sha256: str) -> Tokenizer:
    """A tokenizer of which the hash is known already, so that a sweep reads it once."""
    try:
        return load_tokenizer(path)
    except Exception as error:  # the library raises this very type
        raise CorpusError(
            f"{TOKENIZER_KEY}={path} is no tokenizer ({' '.join(str(error).split())}): give a tokenizer.json of the "
            "tokenizers library."
        ) from error


def named_token(tokenizer: Tokenizer, path: Path, name: str | int | None) -> int:
    """The id of the token that ends a document.

    Raises:
        CorpusError: there is no such token.
    """
    known = tokenizer.get_vocab()
    if isinstance(name, int):
        if name in known.values():
            return name
    elif (END_OF_TEXT if name is None else name) in known:
        return known[END_OF_TEXT if name is None else name]
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    choices = f"one of {', '.join(special[:8])}" if special else "a token of it"
    looked_for = (
        f"{END_KEY}=null: {path} has no {END_OF_TEXT}" if name is None else f"{END_KEY}={name} is not in {path}"
    )
    raise CorpusError(f"{looked_for}: name the token that ends a document there, {choices}, or its id.")


def needs_end_of_text(given: str | None = None) -> CorpusError:
    """The error for token ids of which nobody has said how a document ends, or by a name that nobody can look up."""
    why = (
        "and token ids do not say which of them ends a document"
        if given is None
        else f"which only {TOKENIZER_KEY} could tell the id of"
    )
    return CorpusError(
        f"{END_KEY}={'null' if given is None else given}, {why}: give the id, such as 50256 for GPT-2's, or "
        f"{TOKENIZER_KEY}."
    )
