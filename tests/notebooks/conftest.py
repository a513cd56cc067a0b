from pathlib import Path

import program
import pytest


@pytest.fixture(scope="session")
def small_sweep(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a real sweep of two arms; other folders of tests that ask for it get the same one."""
    runs = tmp_path_factory.getbasetemp() / "small_sweep"
    if not runs.exists():
        done = program.train("-m", *small_corpus, "router=base,switch", f"runs_dir={runs}")
        assert done.returncode == 0, done.stderr
    return runs / "debug"
