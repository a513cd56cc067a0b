"""Any data set of text or of token ids that the `datasets` library can open, from the Hub or from disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_base.data.corpus import COLUMN_KEY, CorpusError, Document, TokenDocument, missing_column, row_document


class HuggingFace:
    """One split of a Hugging Face data set, one document per row.

    Args:
        path: a folder written by `save_to_disk`, or whatever `datasets.load_dataset` takes.
        name: the configuration of the data set, where it has several.
        split: the split to read; this project makes its own train and validation splits from it.
        column: the column with a text, or with a list of token ids such as `input_ids`.
        domain_column: the column that names a row's domain; without it the whole data set is one domain.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        column: str = "text",
        domain_column: str | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.split = split
        self.column = column
        self.domain_column = domain_column

    def documents(self) -> Iterator[Document | TokenDocument]:
        """The rows of the split, in order; rows without anything are left out.

        Raises:
            CorpusError: `datasets` is not installed; the data set cannot be opened; a split or column is not there.
        """
        rows = self._open()
        for key, column in ((COLUMN_KEY, self.column), ("data.corpus.domain_column", self.domain_column)):
            if column is not None and column not in rows.column_names:
                raise missing_column(key, column, rows.column_names, self.path)
        domain = Path(self.path).name
        number = 0
        for batch in rows.iter(batch_size=256):
            domains = batch[self.domain_column] if self.domain_column else [domain] * len(batch[self.column])
            for value, label in zip(batch[self.column], domains, strict=True):
                number += 1
                if value is not None:
                    where = f"row {number} of {self.path}"
                    yield row_document(f"{self.split}#{number}", str(label), value, self.column, where)

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise CorpusError(
                "data=huggingface needs the `datasets` library, which is not installed: "
                "pip install 'lightning-base[huggingface]'."
            ) from None
        folder = Path(self.path).expanduser()
        saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
        try:
            if not saved:
                return datasets.load_dataset(self.path, self.name, split=self.split)
            opened = datasets.load_from_disk(str(folder))
        except Exception as error:  # the library raises a dozen unrelated types for "there is no such thing"
            reason = " ".join(str(error).split())
            raise CorpusError(
                f"data.corpus.path={self.path} cannot be opened ({reason}): "
                "give a data set's name on the Hub or a folder written by save_to_disk."
            ) from error
        if not isinstance(opened, datasets.DatasetDict):
            return opened
        if self.split not in opened:
            raise CorpusError(
                f"data.corpus.split={self.split} is not in {self.path}: choose one of {', '.join(map(str, opened))}."
            )
        return opened[self.split]
