"""A user's own files: plain text, JSON lines or Parquet. The rows of the last two may hold token ids instead."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_base.data.corpus import COLUMN_KEY, CorpusError, Document, TokenDocument, missing_column, row_document
from lightning_base.data.files import FILES_KEY, find_files, readable

SUFFIXES = (".txt", ".jsonl", ".parquet")

# How far past the wished length a long text file is searched for the end of a line.
LINE_LIMIT = 4096


class TextFiles:
    """Files found by glob.

    A `.txt` file is one document, with its folder as the domain; a row of `.jsonl` or `.parquet` is one document, with
    the file's stem as the domain. A `.txt` file longer than `document_characters` is cut at line ends into documents of
    about that length, so that a corpus kept in one large file can be split and never has to fit in memory.

    Args:
        files: a glob (`**` crosses folders) or a list of them.
        column: the column of `.jsonl` and `.parquet` files with a text, or a list of token ids.
        document_characters: longest document taken from a `.txt` file; None keeps every file whole.
    """

    def __init__(
        self, files: str | Sequence[str], column: str = "text", document_characters: int | None = 100_000
    ) -> None:
        if document_characters is not None and document_characters < 1:
            raise CorpusError(
                f"data.corpus.document_characters={document_characters} is too small: give 1 or more, or null."
            )
        self.files = files
        self.column = column
        self.document_characters = document_characters

    def documents(self) -> Iterator[Document | TokenDocument]:
        """The documents of every file, files ordered by path.

        Raises:
            CorpusError: a glob matches nothing; a file is empty, binary, unreadable or of another kind; a row has no
                such column, or something other than text or token ids in it.
        """
        readers = {".txt": self._text, ".jsonl": self._json_lines, ".parquet": self._parquet}
        for path, name in find_files(self.files, SUFFIXES):
            try:
                with readable(path):
                    yield from readers[path.suffix](path, name)
            except UnicodeDecodeError:
                raise _binary(path) from None

    def _text(self, path: Path, name: str) -> Iterator[Document]:
        domain = path.resolve().parent.name
        # newline="" keeps line ends as they are; utf-8-sig drops the mark that some editors put first.
        with path.open(encoding="utf-8-sig", newline="") as file:
            for part, text in enumerate(self._parts(file)):
                if "\0" in text:
                    raise _binary(path)
                yield Document(name if part == 0 else f"{name}#{part}", domain, text)

    def _parts(self, file: IO[str]) -> Iterator[str]:
        if self.document_characters is None:
            yield file.read()
            return
        while text := file.read(self.document_characters):
            yield text + file.readline(LINE_LIMIT)

    def _json_lines(self, path: Path, name: str) -> Iterator[Document | TokenDocument]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if b"\0" in line:
                    raise _binary(path)
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except json.JSONDecodeError as error:
                    raise CorpusError(
                        f"{FILES_KEY}: line {number} of {path} is not JSON ({error.msg}): give one object per line."
                    ) from None
                if not isinstance(row, dict):
                    raise CorpusError(
                        f"{FILES_KEY}: line {number} of {path} is a {type(row).__name__}: give a JSON object per line."
                    )
                if self.column not in row:
                    raise missing_column(COLUMN_KEY, self.column, map(str, row), f"{path}, line {number}")
                if row[self.column] is not None:
                    where = f"line {number} of {path}"
                    yield row_document(f"{name}#{number}", path.stem, row[self.column], self.column, where)

    def _parquet(self, path: Path, name: str) -> Iterator[Document | TokenDocument]:
        try:
            file = pq.ParquetFile(path)
        except pa.ArrowInvalid:
            raise CorpusError(
                f"{FILES_KEY}: {path} is not a Parquet file: give Parquet, or rename it after what it is."
            ) from None
        with file:
            schema = file.schema_arrow
            if self.column not in schema.names:
                raise missing_column(COLUMN_KEY, self.column, schema.names, str(path))
            kind = schema.field(self.column).type
            value = kind.value_type if pa.types.is_dictionary(kind) else kind
            text = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
            ids = (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)
            if not (text or ids):
                raise CorpusError(
                    f"{COLUMN_KEY}={self.column} is of type {kind} in {path}: name a column of text, or of lists of "
                    "token ids."
                )
            number = 0
            for rows in file.iter_batches(batch_size=256, columns=[self.column]):
                for row in rows.column(0).to_pylist():
                    number += 1
                    if row is not None:
                        yield row_document(f"{name}#{number}", path.stem, row, self.column, f"row {number} of {path}")


def _binary(path: Path) -> CorpusError:
    return CorpusError(f"{FILES_KEY}: {path} is not UTF-8 text but binary data: give text files, or narrow the glob.")
