import os
from pathlib import Path

# Before anything of this package: what is first imported from a module whose shapes are checked is compiled anew.
import matplotlib.pyplot  # noqa: F401
import numba  # noqa: F401
import program
import pytest
import pytorch_lightning  # noqa: F401
import scipy.optimize
import scipy.stats  # noqa: F401
import torch
import torch._dynamo
import torch.utils.tensorboard
from filelock import FileLock
from hypothesis import settings

# One thread: fair to others on shared cores, and the same order of additions everywhere.
torch.set_num_threads(1)
# No deadline per example: a shared core may pause at any moment.
settings.register_profile("shared_cores", deadline=None)
settings.load_profile("shared_cores")


# Long ones first, in this order, so that no process is left with one at the end; a file stays in one process.
FIRST = (
    "analysis/test_the_n",
    "faults/test_i",
    "distributed/test_w",
    "faults/",
    "routing/test_a",
    "analysis/",
    "test_r",
    "library/test_in",
    "docs/",
)
FIRST += ("test_", "distributed/", "notebooks/", "assignment/", "library/", "report/test_f", "callbacks/")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slurm" not in config.option.markexpr:  # it starts daemons, and needs to be root
        items[:] = [item for item in items if item.get_closest_marker("slurm") is None]

    def turn(item: pytest.Item) -> int:
        place = str(item.path.relative_to(Path(__file__).parent))
        return next((i for i, start in enumerate(FIRST) if place.startswith(start)), len(FIRST))

    items.sort(key=turn)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a run of the real program on a small corpus."""
    return program.small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this session of tests have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def small_sweep(small_corpus: list[str], shared: Path) -> Path:
    """The directory of a real sweep of two arms, which is run once for whoever asks for it."""
    runs = shared / "small_sweep"
    with FileLock(shared / "small_sweep.lock"):
        if not runs.exists():
            done = program.train("-m", *small_corpus, "router=base,switch", f"runs_dir={runs}")
            assert done.returncode == 0, done.stderr
    return runs / "debug"
