"""Byte-level BPE, learnt from the training documents alone and able to write any text back; or one that is given."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"

# 256 bytes and the end of text: with fewer tokens some text could not be written at all.
SMALLEST_VOCABULARY = 257

# Long texts are encoded in pieces, because an encoding takes a hundred times the memory of its text.
PIECE_CHARACTERS = 1 << 18

# GPT-2's words, none longer than 128 characters: training takes time quadratic in the longest one, and a run of 40,000
# equal letters (base64, DNA, a ruler of dashes) took 2 seconds by itself.
LONGEST = "{1,128}"
WORDS = Regex(
    rf"'(?:s|t|re|ve|m|ll|d)| ?\p{{L}}{LONGEST}| ?\p{{N}}{LONGEST}| ?[^\s\p{{L}}\p{{N}}]{LONGEST}"
    rf"|\s{LONGEST}(?!\S)|\s{LONGEST}"
)
# How SentencePiece writes a byte that no token of its vocabulary holds.
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def untrained_tokenizer() -> Tokenizer:
    """How text is cut into words and bytes, before any merge is learnt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens; fewer if the texts hold no more pairs to merge."""
    tokenizer = untrained_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer saved at `path`, reading a literal `<|endoftext|>` in a text as ordinary characters.

    What it was saved with to fit texts into a model, padding and truncation, is turned off.
    """
    tokenizer = Tokenizer.from_file(str(path))
    # Otherwise a document that merely mentions the token would end in the middle.
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def size_of(tokenizer: Tokenizer) -> int:
    """V: one more than the largest id, since some vocabularies have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether its tokens are bytes, each written as one letter."""
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


def bytes_per_token(tokenizer: Tokenizer, end_of_text: int) -> Int64[np.ndarray, "V"]:
    """How many bytes of text each token stands for; 0 for the end of text and other special tokens.

    Exact for tokens that are bytes. Other tokens are read as SentencePiece's, with ▁ for a space and <0x0A> for a
    byte; whether that is so has to be held against a text.
    """
    byte_level, added = is_byte_level(tokenizer), tokenizer.get_added_tokens_decoder()
    sizes = np.zeros(size_of(tokenizer), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        if index in added:
            sizes[index] = 0 if added[index].special else len(token.encode())
        elif byte_level:
            sizes[index] = len(token)
        else:
            sizes[index] = 1 if BYTE.fullmatch(token) else len(token.replace("▁", " ").encode())
    sizes[end_of_text] = 0
    return sizes


def pieces(text: str) -> Iterator[str]:
    """The text cut into pieces of bounded length, at the end of a line where there is one."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        line_end = text.rfind("\n", start, start + PIECE_CHARACTERS)
        stop = line_end + 1 if line_end >= 0 else start + PIECE_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]
