from pathlib import Path

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
