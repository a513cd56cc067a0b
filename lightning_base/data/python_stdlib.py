"""The source text of the running interpreter's standard library: real text that is already on every machine."""

import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from lightning_base.data.corpus import CorpusError, Document

# Tests are a third of the library and mostly tables of cases; third-party packages are not the standard library.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})

# Generated when the interpreter was built: paths and compiler flags of one machine.
SKIPPED_PREFIX = "_sysconfigdata"


class PythonStandardLibrary:
    """About 12 MB of Python source, without the library's own tests. The domain is the top-level package or module."""

    def documents(self) -> Iterator[Document]:
        """One document per source file, ordered by path.

        Raises:
            CorpusError: this interpreter comes without the source of its library.
        """
        root = Path(sysconfig.get_path("stdlib"))
        paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py") if _belongs(path, root))
        if not paths:
            raise CorpusError(
                f"data=python_stdlib finds no source files in {root}: "
                "use an interpreter that has its library unpacked, or data=text with your own files."
            )
        for name in paths:
            # tokenize.open reads a file the way the interpreter does, with the encoding it declares.
            with tokenize.open(root / name) as file:
                yield Document(name, domain=name.split("/")[0].removesuffix(".py"), text=file.read())


def _belongs(path: Path, root: Path) -> bool:
    folders = path.relative_to(root).parts[:-1]
    return SKIPPED_FOLDERS.isdisjoint(folders) and not path.name.startswith(SKIPPED_PREFIX) and path.is_file()
