import shutil
import sysconfig
from pathlib import Path

import program
import pytest
from filelock import FileLock

ROUTERS = ("base", "top_k", "hash", "random", "expert_choice")
DOMAINS = ("asyncio", "email", "http", "json", "xml")
LONGEST = 2000  # characters of a document


@pytest.fixture(scope="session")
def domain_corpus(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a run on a small corpus with a domain per package of the standard library."""
    folder = tmp_path_factory.mktemp("domains")
    for domain in DOMAINS:
        (folder / domain).mkdir()
        for path in sorted((Path(sysconfig.get_paths()["stdlib"]) / domain).glob("*.py")):
            # A hash of their text chooses what is held out: short ones, so that every domain is there in every Python.
            for start in range(0, len(text := path.read_text().strip()), LONGEST):
                (folder / domain / f"{path.stem}_{start}.txt").write_text(text[start : start + LONGEST])
    return [*small_corpus, f"data.corpus.files={folder}/*/*.txt", f"data.cache_dir={folder}/cache"]


@pytest.fixture(scope="session")
def kept(domain_corpus: list[str], shared: Path) -> dict[str, Path]:
    """Finished runs of five routers with a checkpoint of every step and recorded plans, by router."""
    runs = shared / "kept"
    options = ("trainer.keep_checkpoints=null", "trainer.checkpoint_every_n_steps=1", "module.learning_rate=0.03")
    options += ("trainer.record_plans=true",)
    with FileLock(shared / "kept.lock"):
        if not runs.exists():
            done = program.train("-m", *domain_corpus, f"router={','.join(ROUTERS)}", *options, f"runs_dir={runs}")
            assert done.returncode == 0, done.stderr
    found = program.jobs(runs)
    return {router: path for router in ROUTERS for name, path in found.items() if f"router={router}" in name}


@pytest.fixture(scope="session")
def dense(domain_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without routing that keeps one checkpoint."""
    runs = tmp_path_factory.mktemp("dense")
    options = ("router=dense", "trainer.keep_checkpoints=1", "trainer.checkpoint_every_n_steps=1")
    done = program.train(*domain_corpus, *options, f"runs_dir={runs}")
    assert done.returncode == 0, done.stderr
    return program.only_job(runs)


@pytest.fixture
def copy(kept: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of BASE's run to damage."""
    return Path(shutil.copytree(kept["base"], tmp_path / "run", ignore=shutil.ignore_patterns("analysis")))
