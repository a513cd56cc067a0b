"""A sweep: checked whole before its first job starts, so that the last arm's mistake does not show after hours."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_base.config import Config, check_devices, read_config
from lightning_base.distributed.forked import warm_up
from lightning_base.explain import BAD_INPUT, explain
from lightning_base.instantiation import ConfigError
from lightning_base.jobs import (
    RANK_ENTRY,
    check_nodes,
    check_run_directory,
    node_rank,
    plain_config,
    prepare_data,
    shown,
)
from lightning_base.run_directory import RunDirectory, write_json


class CheckSweep(Callback):
    """A Hydra callback: checks all jobs of a sweep before the first one starts, and notes them in sweep.json."""

    expected: list[RunDirectory] | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Hydra turns exceptions of callbacks into warnings; only an exit gets through.
        # It imports what the jobs need while this process checks them.
        warm_up(RANK_ENTRY)
        try:
            self._check(config)
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            print(f"error: {explain(error)}", file=sys.stderr)
            sys.exit(BAD_INPUT)

    def _check(self, config: DictConfig) -> None:
        from hydra.core.global_hydra import GlobalHydra

        loader = GlobalHydra.instance().config_loader()
        sweep = Path(config.hydra.sweep.dir)
        jobs: list[RunDirectory] = []
        corpora: list[Config] = []
        combinations = expand(config)
        for overrides in combinations:
            composed = loader.load_sweep_config(config, list(overrides))
            HydraConfig.instance().set_config(composed)
            subdirectory = str(composed.hydra.sweep.subdir)
            plain = plain_config(composed)
            checked = read_config(plain)
            check_devices(checked.trainer)
            check_nodes(checked)
            run = RunDirectory(sweep / subdirectory)
            if node_rank(checked) == 0:
                check_run_directory(run, plain)
            if run in jobs:
                raise ConfigError(f"two jobs of the sweep would share {shown(run.path)}: let hydra.sweep.subdir differ")
            jobs.append(run)
            if all(checked.data != other.data for other in corpora):
                corpora.append(checked)
        for checked in corpora:
            prepare_data(checked)
        labels = job_labels(combinations)
        write_json(
            sweep / "sweep.json", {"jobs": {run.path.name: label for run, label in zip(jobs, labels, strict=True)}}
        )
        if CheckSweep.expected is not None:
            CheckSweep.expected[:] = jobs


def expand(config: DictConfig) -> Sequence[Sequence[str]]:
    """The overrides of every job of a sweep, as Hydra's basic sweeper will make them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parameters = OmegaConf.select(config, "hydra.sweeper.params") or {}
    written = [f"{key}={value}" for key, value in parameters.items()] + list(config.hydra.overrides.task)
    parsed = OverridesParser.create().parse_overrides(written)
    return [overrides for batch in BasicSweeper.split_arguments(parsed, None) for overrides in batch]


def job_labels(combinations: Sequence[Sequence[str]]) -> list[str]:
    """What tells the jobs of a sweep apart: the overrides that are not common to all of them."""
    common = set.intersection(*(set(overrides) for overrides in combinations)) if len(combinations) > 1 else set()
    distinct = [[override for override in overrides if override not in common] for overrides in combinations]
    return [", ".join(override.removeprefix("router=") for override in overrides) for overrides in distinct]
