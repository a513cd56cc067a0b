"""Experiments that start from what others left: every job from the one with its own seed."""

import re

import hydra
import pytest
from forks import REPOSITORY
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode


@pytest.mark.parametrize("experiment", ["final_plan", "replay_final"])
def test_a_job_starts_from_runs_of_its_own_seed(experiment: str) -> None:
    found: dict[int, set[str]] = {1: set(), 2: set(), 3: set()}
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3", job_name="train"):
        opened = GlobalHydra.instance().hydra
        assert opened is not None
        given = [f"experiment={experiment}", "seed=1,2,3"]
        config = opened.compose_config("config", given, run_mode=RunMode.MULTIRUN)
        # As Hydra's sweeper reads them, which is before there are jobs.
        swept = [f"{key}={value}" for key, value in config.hydra.sweeper.params.items()]
        (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(swept + given), None)
        for overrides in jobs:
            job = opened.config_loader.load_sweep_config(config, list(overrides))
            # Hashing learns nothing: its plan needs no weights.
            source = job.router.get("source") or job.module.initial_weights or "nothing"
            assert set(re.findall(r"seed=(\d+)", source)) <= {str(job.seed)}
            found[job.seed].add(source.replace(f"seed={job.seed}", "seed=N"))
    assert found[1] == found[2] == found[3]
    assert len(found[1]) == 3
