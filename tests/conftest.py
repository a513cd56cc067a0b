import program
import pytest
import torch
from hypothesis import settings

# One thread: fair to others on shared cores, and the same order of additions everywhere.
torch.set_num_threads(1)
# No deadline per example: a shared core may pause at any moment.
settings.register_profile("shared_cores", deadline=None)
settings.load_profile("shared_cores")


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a run of the real program on a small corpus."""
    return program.small_corpus(tmp_path_factory.mktemp("corpus"))
