"""A user's own arrays of token ids: NumPy's `.npy`, or raw `.bin` as nanoGPT and Megatron write them.

Shapes: N ids in a file, D documents in it, S sequences that Megatron's index knows.
"""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64, Integer

from lightning_base.data.corpus import CorpusError, TokenDocument
from lightning_base.data.files import FILES_KEY, find_files, readable
from lightning_base.data.vocabulary import needs_end_of_text

SUFFIXES = (".npy", ".bin")
DTYPE_KEY, INDEX_KEY = "data.corpus.dtype", "data.corpus.index"
BLOCK = 1 << 20  # ids searched for ends of text at a time

Dtype = Literal["uint8", "uint16", "uint32", "int16", "int32", "int64"]
# Megatron's index: a magic, a version, the type of the ids, how many sequences and document bounds follow.
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
MEGATRON_TYPES = {1: "uint8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


class TokenFiles:
    """Files found by glob, each one array of ids that is never read as a whole.

    A document ends at every end of text, or where an index says. The domain is the file's stem.

    Args:
        files: a glob (`**` crosses folders) or a list of them.
        dtype: the type of the ids in `.bin` files, which do not say; Megatron's index does.
        index: what the name of a file's index ends in where the file's has its suffix, such as `.idx`: an index of
            Megatron, or a `.npy` array [D+1] of where documents begin, with N at its end. None cuts at ends of text.
        document_tokens: a longer document is cut into several; None keeps all whole.
        end_of_text: the id that ends a document.

    Raises:
        CorpusError: an option that cannot be used, or no id that ends a document.
    """

    def __init__(
        self,
        files: str | Sequence[str],
        dtype: Dtype | None = None,
        index: str | None = None,
        document_tokens: int | None = 100_000,
        *,
        end_of_text: int | str | None,
    ) -> None:
        if document_tokens is not None and document_tokens < 1:
            raise CorpusError(f"data.corpus.document_tokens={document_tokens} is too small: give 1 or more, or null.")
        if index is not None and not index.startswith((".", "_", "-")):
            raise CorpusError(f"{INDEX_KEY}={index} is no ending of a file's name: give one such as .idx")
        if not isinstance(end_of_text, int):
            raise needs_end_of_text(end_of_text)
        self.files = files
        self.dtype = dtype
        self.index = index
        self.document_tokens = document_tokens
        self.end_of_text = end_of_text

    def documents(self) -> Iterator[TokenDocument]:
        """The documents of every file, files ordered by path.

        Raises:
            CorpusError: a glob matches nothing; a file is empty, unreadable, of another kind or type; an index is
                missing or does not fit.
        """
        for path, name in find_files(self.files, SUFFIXES, besides=self.index):
            with readable(path):
                for number, ids in enumerate(self._pieces(path), start=1):
                    yield TokenDocument(f"{name}#{number}", path.stem, ids)

    def _pieces(self, path: Path) -> Iterator[Integer[np.ndarray, "n"]]:
        ids_N, bounds = self._open(path)
        for start, stop in bounds:
            step = self.document_tokens or max(stop - start, 1)
            for first in range(start, stop, step):
                yield ids_N[first : min(first + step, stop)]

    def _open(self, path: Path) -> tuple[Integer[np.ndarray, "N"], Iterator[tuple[int, int]]]:
        """The ids of a file, and where its documents begin and end."""
        if self.index is None:
            ids_N = self._ids(path, self.dtype)
            return ids_N, self._ends_of_text(ids_N)
        beside = path.with_name(path.stem + self.index)
        if not beside.is_file():
            raise CorpusError(f"{INDEX_KEY}={self.index}: {beside} is not there: {path} needs an index beside it.")
        with readable(beside), beside.open("rb") as file:
            header = file.read(HEADER.size)
        if header[: len(MAGIC)] == MAGIC:
            bounds, dtype = megatron_bounds(beside, header)
            ids_N = self._ids(path, dtype)
        else:
            bounds, ids_N = load_array(beside, INDEX_KEY).astype(np.int64), self._ids(path, self.dtype)
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(ids_N) or (np.diff(bounds) < 0).any():
            raise CorpusError(
                f"{INDEX_KEY}={self.index}: {beside} does not fit the {len(ids_N):,} ids of {path}: it has to rise "
                "from 0 to their number."
            )
        return ids_N, zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)

    def _ids(self, path: Path, dtype: str | None) -> Integer[np.ndarray, "N"]:
        if path.suffix == ".npy":
            return load_array(path, FILES_KEY)
        if dtype is None:
            raise CorpusError(
                f"{DTYPE_KEY}=null: {path} does not say of what type its ids are: give uint16 or another."
            )
        size = np.dtype(dtype).itemsize
        if path.stat().st_size % size:
            raise CorpusError(
                f"{DTYPE_KEY}={dtype}: the {path.stat().st_size:,} bytes of {path} are no multiple of {size}: give the "
                "type it was written with."
            )
        return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")

    def _ends_of_text(self, ids_N: Integer[np.ndarray, "N"]) -> Iterator[tuple[int, int]]:
        start = 0
        for block in range(0, len(ids_N), BLOCK):
            for end in (np.flatnonzero(ids_N[block : block + BLOCK] == self.end_of_text) + block).tolist():
                yield start, end
                start = end + 1
        yield start, len(ids_N)


def load_array(path: Path, key: str) -> Integer[np.ndarray, "N"]:
    """A memory map of a `.npy` file of whole numbers.

    Raises:
        CorpusError: it is none, or has other than one dimension.
    """
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CorpusError(f"{key}: {path} is not an array in NumPy's format: write it with numpy.save.") from error
    if not isinstance(found, np.ndarray) or found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        what = f"{getattr(found, 'dtype', type(found).__name__)}{list(getattr(found, 'shape', []))}"
        raise CorpusError(f"{key}: {path} holds {what}: give one array of whole numbers with one dimension.")
    return found


def megatron_bounds(path: Path, header: bytes) -> tuple[Int64[np.ndarray, "bounds"], str]:
    """Where documents begin in the `.bin` beside an index of Megatron's, with its end; and the type of the ids.

    Raises:
        CorpusError: the index is cut off, or of a version or type that is not known.
    """
    try:
        _, version, code, sequences, documents = HEADER.unpack(header)
        dtype = MEGATRON_TYPES[code]
        if version != 1:
            raise ValueError
        lengths_S = np.fromfile(path, dtype="<i4", count=sequences, offset=HEADER.size)
        # Between the two lie the sequences' places in bytes, which follow from their lengths.
        bounds = np.fromfile(path, dtype="<i8", count=documents, offset=HEADER.size + 12 * sequences)
        offsets_S = np.concatenate([[0], np.cumsum(lengths_S, dtype=np.int64)])
        return offsets_S[bounds], dtype
    except (struct.error, KeyError, ValueError, IndexError) as error:
        raise CorpusError(f"{INDEX_KEY}: {path} is not a whole index of Megatron's, version 1, for ids.") from error
