"""A figure once it is drawn: what pages and texts need, without what draws it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its file name without a suffix, what one sees in it, and its bytes in two formats.

    ``width`` is in inches, at which its letters have the size of the text around it.
    """

    name: str
    title: str
    caption: str
    width: float
    svg: bytes
    png: bytes

    def begins(self, beginnings: tuple[str, ...]) -> bool:
        """Whether the name begins so, after the number of its comparison."""
        return re.sub(r"^\d+_", "", self.name).startswith(beginnings)


def claimed(beginnings: tuple[str, ...], pictures: Sequence[Picture]) -> list[Picture]:
    """The figures that belong to a table, in the order in which they were drawn."""
    return [picture for picture in pictures if picture.begins(beginnings)]
