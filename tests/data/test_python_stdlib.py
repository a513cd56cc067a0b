import sysconfig
from pathlib import Path

import pytest

from lightning_base.data import CorpusError, PythonStandardLibrary


def test_the_library_is_read_without_its_tests_and_without_other_packages() -> None:
    documents = {document.name: document for document in PythonStandardLibrary().documents()}
    assert list(documents) == sorted(documents)
    assert documents["argparse.py"].domain == "argparse"
    assert documents["json/decoder.py"].domain == "json"
    assert documents["json/decoder.py"].text == (Path(sysconfig.get_path("stdlib")) / "json/decoder.py").read_text()
    folders = {folder for name in documents for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert sum(len(document.text) for document in documents.values()) > 5_000_000


def test_an_interpreter_without_source_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(CorpusError, match="data=python_stdlib finds no source files"):
        list(PythonStandardLibrary().documents())
