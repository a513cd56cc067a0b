from pathlib import Path

import pytest
from hand_made_runs import write_experiment


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A sweep of two sound arms."""
    return write_experiment(tmp_path / "hand_made")
