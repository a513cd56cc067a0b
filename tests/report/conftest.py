from pathlib import Path

import program
import pytest
from hand_made_runs import write_json, write_run


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A sweep of two sound arms: BASE with a loss of 5.0, Switch with 4.5."""
    folder = tmp_path / "hand_made"
    write_run(folder / "router=base", "BASE", 5.0)
    write_run(folder / "router=switch", "Switch", 4.5)
    write_json(folder / "sweep.json", {"jobs": {"router=base": "base", "router=switch": "switch"}})
    return folder


@pytest.fixture(scope="session")
def small_sweep(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a real sweep of two arms; other folders of tests that ask for it get the same one."""
    runs = tmp_path_factory.getbasetemp() / "small_sweep"
    if not runs.exists():
        done = program.train("-m", *small_corpus, "router=base,switch", f"runs_dir={runs}")
        assert done.returncode == 0, done.stderr
    return runs / "debug"
