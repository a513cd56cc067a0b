"""Real runs of the program, and what they have left for TensorBoard."""

from pathlib import Path

import program
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ARMS = {
    "base": ("router=base", "router.num_experts=4", "model.depth=4"),
    "switch": ("router=switch", "router.num_experts=16", "model.depth=8"),
}


@pytest.fixture(scope="session")
def runs(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run directories of two arms: few experts in two sparse layers, and many in four."""
    folder, found = tmp_path_factory.mktemp("arms"), {}
    steps = ("trainer.max_steps=4", "trainer.log_every_n_steps=2", "trainer.validate_every_n_steps=4")
    for arm, overrides in ARMS.items():
        small = (*small_corpus, *steps, "data.validation_sequences=8", f"runs_dir={folder}", f"name={arm}")
        done = program.train(*small, *overrides)
        assert done.returncode == 0, done.stderr
        found[arm] = program.only_job(folder, arm)
    return found


@pytest.fixture(scope="session")
def events(runs: dict[str, Path]) -> dict[str, EventAccumulator]:
    """All that the event files of each arm hold."""
    return {arm: EventAccumulator(str(path / "tensorboard")).Reload() for arm, path in runs.items()}
