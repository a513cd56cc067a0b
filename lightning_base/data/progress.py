"""The progress bar of one reading of a corpus."""

import sys
from collections.abc import Iterator
from typing import Protocol, TypeVar

from tqdm import tqdm


class Sized(Protocol):
    """Anything that knows how many bytes of text it stands for."""

    @property
    def size(self) -> int: ...


T = TypeVar("T", bound=Sized)


def progress(entries: Iterator[T], what: str, total: int | None = None) -> Iterator[T]:
    """The same entries, with a bar on stderr if they take longer than a second."""
    with tqdm(desc=what, total=total, unit="B", unit_scale=True, delay=1.0, leave=False, file=sys.stderr) as bar:
        for entry in entries:
            yield entry
            bar.update(entry.size)
