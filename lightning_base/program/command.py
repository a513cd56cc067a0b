"""The program ``train``: Hydra in front, exit codes behind."""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_base.instantiation import ConfigError
from lightning_base.program.config import folder_name
from lightning_base.program.explain import BAD_INPUT, explain, is_mistake
from lightning_base.program.flags import check_flags
from lightning_base.program.job import STARTED, job
from lightning_base.program.plugins import offer_routers, refuse_shadowed
from lightning_base.program.processes.launch import PREEMPTED
from lightning_base.program.run_directory import RunDirectory
from lightning_base.program.sweep import CheckSweep, job_name, jobs_are_known
from lightning_base.program.tree import ENDED_HERE, say, shown

CONF = Path(__file__).parents[1] / "conf"

OmegaConf.register_new_resolver("job_name", job_name, replace=True)
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def main() -> None:
    """Runs a job or a sweep: exits 0 if every job is done, 2 for bad input, 1 for failed jobs."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach this function, which has a sentence for each
    sweep: list[RunDirectory] = []
    mistakes: list[Exception] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def task(config: DictConfig) -> float | None:
        try:
            return job(config)
        except (ConfigError, OmegaConfBaseException) as error:
            if not jobs_are_known(HydraConfig.get().sweeper._target_):
                raise  # a sweeper that goes by results stops at the first job that cannot work
            mistakes.append(error)  # raised here, Hydra would write lines of its own about it
            return None

    CheckSweep.expected = sweep
    STARTED.clear()
    try:
        check_flags(sys.argv[1:])
        refuse_shadowed(sys.argv[1:], CONF)
        offer_routers(sys.argv[1:], CONF / "router")
        with ExitStack() as CheckSweep.display:
            task()
        if mistakes:
            raise mistakes[0]
    except Exception as error:
        if is_mistake(error):
            print(f"error: {explain(error)}", file=sys.stderr)
            sys.exit(BAD_INPUT)
        # What Optuna says when every trial has failed, and joblib when it was told to stop.
        failed = isinstance(error, ValueError) and str(error).startswith("No trials are completed")
        if not failed and not (isinstance(error, RuntimeError) and CheckSweep.stopped is not None):
            raise
    except KeyboardInterrupt:
        print("interrupted; what is done stays done, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    sys.exit(summarize(sweep or STARTED) if CheckSweep.stopped is None else CheckSweep.stopped)


def summarize(jobs: Sequence[RunDirectory]) -> int:
    """Says how each job ended; gives the exit code of the command."""
    if not jobs:
        return 0
    states = [{"state": ENDED_HERE[run]} if run in ENDED_HERE else run.status() for run in jobs]
    bad = [(run, status) for run, status in zip(jobs, states, strict=True) if status.get("state") != "done"]
    if len(jobs) > 1 or bad:
        say(f"{len(jobs) - len(bad)} of {len(jobs)} jobs done")
    for run, status in bad:
        say(f"  {status.get('state', 'not started')}: {shown(run.path)}  {status.get('error', '')}")
    if bad and all(status.get("state") == "preempted" for _, status in bad):
        return PREEMPTED
    if bad:
        return 1
    where = jobs[0].path.parent if len(jobs) > 1 else jobs[0].path
    say(f"results are in {shown(where)}")
    return 0
