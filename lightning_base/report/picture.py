"""A figure once it is drawn: what pages and texts need, without what draws it."""

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
