"""Tokens as text that can be seen in a table, in most vocabularies written byte by byte."""

from functools import cache

from tokenizers import Tokenizer

from lightning_base.data.tokenizer import END_OF_TEXT

SEEN = {" ": "␣", "\n": "↵", "\t": "⇥"}


def printable_token(tokenizer: Tokenizer, token: int) -> str:
    """One token so that a reader sees all of it: white space as signs, what is no character as ``\\x..``.

    A token may be part of a character, which decoding would turn into a replacement sign, the same for all.
    """
    name = tokenizer.id_to_token(token)
    if name is None or name == END_OF_TEXT:
        return END_OF_TEXT if name else f"<{token}>"
    letters = byte_of_letter()
    if not all(letter in letters for letter in name):  # a token of characters
        return visible(name.encode())
    return visible(bytes(letters[letter] for letter in name))


def visible(content: bytes) -> str:
    r"""Bytes as text without anything invisible.

    >>> visible(b" if\n")
    '␣if↵'
    >>> visible("é".encode()[:1])
    '\\xc3'
    """
    return "".join(
        SEEN.get(letter) or (letter if letter.isprintable() else ascii(letter)[1:-1])
        for letter in content.decode("utf-8", errors="backslashreplace")
    )


@cache
def byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: a letter for every byte, itself if it is printable in Latin-1, else one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}
