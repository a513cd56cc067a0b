"""What is checked before the first job: the whole of a sweep, or its last arm's mistake would show after hours."""

import hashlib
import importlib.util
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import psutil
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Transformer
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lightning_base.instantiation import ConfigError
from lightning_base.program.config import Config
from lightning_base.program.explain import BAD_INPUT, explain, is_mistake
from lightning_base.program.job import (
    check_callbacks,
    check_nodes,
    check_run_directory,
    plain_config,
    prepare_data,
)
from lightning_base.program.processes.forked import warm_up
from lightning_base.program.processes.launch import GRACE_SECONDS, LOOK_SECONDS, PREEMPTED, STOP_SIGNALS
from lightning_base.program.read_config import check_devices, check_loggers, read_config
from lightning_base.program.resume import check_resume
from lightning_base.program.run_directory import RunDirectory, read_json, write_json
from lightning_base.program.tree import LIVE_TABLE, RANK_ENTRY, node_rank, shown

# Launchers and sweepers that pyproject.toml has an extra for.
EXTRAS = ("joblib", "optuna", "submitit")


class CheckSweep(Callback):
    """A Hydra callback: checks all jobs before the first one starts and anything is on the disk; notes a sweep's in
    sweep.json."""

    expected: list[RunDirectory] | None = None
    # The exit code of a command that was asked to stop while worker processes run its jobs.
    stopped: int | None = None
    # What is on the terminal as long as jobs run; whoever began the command ends it.
    display = ExitStack()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with leaving():
            checked, plain = check_composed(config)
            run = RunDirectory(Path(config.hydra.run.dir).absolute())
            if node_rank(checked) == 0 and check_place(run, checked, plain):
                prepare_data(checked)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with leaving():
            # It imports what the jobs need while this process checks them.
            warm_up(RANK_ENTRY)
            self._check(config)

    def _check(self, config: DictConfig) -> None:
        check_plugins(config)
        sweep = Path(config.hydra.sweep.dir)
        if "n_jobs" in config.hydra.launcher:
            stop_with_workers(sweep)
        if not jobs_are_known(config.hydra.sweeper._target_):
            # Each job is checked when it comes; what is common to all of them is checked now.
            checked, _, _ = check_job(config, first_point(config))
            prepare_data(checked)
            write_json(sweep / "sweep.json", {"jobs": {}})
            return
        jobs: list[RunDirectory] = []
        corpora: list[Config] = []
        combinations = expand(config)
        for overrides in combinations:
            checked, plain, run = check_job(config, overrides)
            if node_rank(checked) == 0:
                check_place(run, checked, plain)
            if run in jobs:
                raise ConfigError(f"two jobs of the sweep would share {shown(run.path)}: let hydra.sweep.subdir differ")
            jobs.append(run)
            if all(checked.data != other.data for other in corpora):
                corpora.append(checked)
        for checked in corpora:
            prepare_data(checked)
        labels = job_labels(combinations)
        named = {run.path.name: label for run, label in zip(jobs, labels, strict=True)}
        write_json(sweep / "sweep.json", {"jobs": named, "earlier": earlier_labels(sweep, named)})
        if CheckSweep.expected is not None:
            CheckSweep.expected[:] = jobs
        if config.trainer.get("progress_bar", True) and takes_a_table(sys.stderr):
            self._show(dict(zip(jobs, labels, strict=True)))

    def _show(self, jobs: dict[RunDirectory, str]) -> None:
        from lightning_base.program.live_table import LiveTable  # needs rich, which takes a moment

        os.environ[LIVE_TABLE] = "1"
        CheckSweep.display.callback(os.environ.pop, LIVE_TABLE, None)
        CheckSweep.display.enter_context(LiveTable(jobs))


@contextmanager
def leaving() -> Iterator[None]:
    """Ends this process with whatever is raised within: of an exception Hydra makes a warning, and starts the jobs."""
    try:
        yield
    except Exception as error:
        if is_mistake(error):
            print(f"error: {explain(error)}", file=sys.stderr)
            sys.exit(BAD_INPUT)
        traceback.print_exc()
        sys.exit(1)


def stop_with_workers(sweep: Path) -> None:
    """Where worker processes run the jobs, a signal to this one reaches them, and it waits until their jobs have saved.

    joblib would kill them with all that they have started, or leave them to train on.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        # Kept, because joblib may say something else of workers that end.
        CheckSweep.stopped = 128 + signal.SIGINT if number == signal.SIGINT else PREEMPTED
        # Another one than what a terminal may have sent them: the same one twice would kill their jobs.
        passed_on = signal.SIGTERM if number == signal.SIGUSR1 else signal.SIGUSR1
        for worker in psutil.Process().children():
            with suppress(psutil.Error):  # of one that has ended
                if "loky" in " ".join(worker.cmdline()) and "resource_tracker" not in " ".join(worker.cmdline()):
                    worker.send_signal(passed_on)
        deadline = time.monotonic() + GRACE_SECONDS + LOOK_SECONDS
        while any(RunDirectory(path.parent).is_alive() for path in sweep.glob("*/status.json")):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(PREEMPTED)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def takes_a_table(stream: TextIO) -> bool:
    """Whether a table can be drawn anew in its place: on a terminal that can move its cursor, and nowhere else."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def check_job(config: DictConfig, overrides: Sequence[str]) -> tuple[Config, dict[str, Any], RunDirectory]:
    """One job of a sweep, composed and checked; nothing of it is started."""
    from hydra.core.global_hydra import GlobalHydra

    composed = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
    return *check_composed(composed), RunDirectory(Path(config.hydra.sweep.dir) / str(composed.hydra.sweep.subdir))


def check_composed(composed: DictConfig) -> tuple[Config, dict[str, Any]]:
    """The same of a job as Hydra has composed it."""
    HydraConfig.instance().set_config(composed)
    plain = plain_config(composed)
    checked = read_config(plain)
    check_devices(checked.trainer)
    check_loggers(checked.logger)
    check_nodes(checked)
    check_callbacks(checked)
    return checked, plain


def check_place(run: RunDirectory, config: Config, plain: dict[str, Any]) -> bool:
    """Whether there is anything left to do in a directory; ConfigError if that cannot be."""
    if not run.path.exists():
        check_resume(run, config.resume)
    return check_run_directory(run, plain)


def check_plugins(config: DictConfig) -> None:
    """Raises ConfigError for a launcher or sweeper whose package is an extra that is not installed."""
    for kind in ("launcher", "sweeper"):
        package = ".".join(str(config.hydra[kind]._target_).split(".")[:2])
        if package.startswith("hydra_plugins.") and importlib.util.find_spec(package) is None:
            name = config.hydra.runtime.choices[f"hydra/{kind}"]
            extra = package.split("_")[2]
            how = f": pip install 'lightning-base[{extra}]'" if extra in EXTRAS else ""
            raise ConfigError(
                f"hydra/{kind}={name} needs the package {package.split('.')[1].replace('_', '-')}, which is not "
                f"installed{how}; or choose hydra/{kind}=basic"
            )


def jobs_are_known(sweeper: str) -> bool:
    """Whether all jobs of a sweep are known before the first one: Hydra's own sweeper takes every combination."""
    return sweeper.endswith(".BasicSweeper")


def written_overrides(config: DictConfig) -> list[Override]:
    """What a sweep varies and what it fixes, from the configuration of its sweeper and from the command line."""
    parameters = OmegaConf.select(config, "hydra.sweeper.params") or {}
    written = [f"{key}={value}" for key, value in parameters.items()] + list(config.hydra.overrides.task)
    return OverridesParser.create().parse_overrides(written)


def expand(config: DictConfig) -> Sequence[Sequence[str]]:
    """The overrides of every job of a sweep, as Hydra's basic sweeper will make them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    written = written_overrides(config)
    for override in written:
        if isinstance(override.value(), IntervalSweep):
            raise ConfigError(
                f"{override.input_line}: interval(...) needs a sweeper that chooses from it: hydra/sweeper=search"
            )
    batches = BasicSweeper.split_arguments(written, None)
    return [overrides for batch in batches for overrides in batch]


def first_point(config: DictConfig) -> list[str]:
    """The overrides of a job at the beginning of everything that a sweeper may vary."""
    point = []
    for override in written_overrides(config):
        value = override.value()
        if isinstance(value, IntervalSweep):
            point.append(f"{override.get_key_element()}={value.start}")
        elif override.is_sweep_override():
            first = next(iter(override.sweep_iterator(transformer=Transformer.encode)))
            point.append(f"{override.get_key_element()}={first}")
        else:
            point.append(str(override.input_line))
    return point


def job_labels(combinations: Sequence[Sequence[str]]) -> list[str]:
    """What tells the jobs of a sweep apart: the overrides not common to all of them; of a single job its router.

    >>> job_labels([["router=base", "model=tiny", "seed=1"], ["router=switch", "model=tiny", "seed=1"]])
    ['base', 'switch']
    >>> job_labels([["router=switch", "router.capacity_factor=2", "model=tiny"]])
    ['switch, router.capacity_factor=2']
    """
    common = set.intersection(*map(set, combinations))
    if len(combinations) == 1:
        of_router = {override for override in common if override.startswith(("router", "arm="))}
        common = common - of_router if of_router else set()
    distinct = [[override for override in overrides if override not in common] for overrides in combinations]
    return [", ".join(override.removeprefix("router=") for override in overrides) for overrides in distinct]


def earlier_labels(sweep: Path, jobs: dict[str, str]) -> dict[str, str]:
    """What earlier commands in the same folder called the jobs that are still there and not among these."""
    try:
        found = read_json(sweep / "sweep.json")
        known = {**found.get("earlier", {}), **found.get("jobs", {})}
    except (TypeError, ValueError):
        return {}
    return {name: label for name, label in known.items() if name not in jobs and (sweep / name).is_dir()}


def job_name(override_dirname: str, seed: int) -> str:
    """The folder of one job: its overrides, cut with a hash where a file system would refuse the length, and its seed.

    The seed is always there, given or not, so that adding seeds to an experiment does not train the first one again.

    >>> job_name("model.width=64,router=base", 2)
    'router=base,model.width=64,seed=2'
    >>> job_name("", 1)
    'seed=1'
    """
    # The router first: it is what one looks for in a listing.
    name = re.sub(r"^(.*),(router=[^,]*)", r"\2,\1", override_dirname.replace("/", "_"))
    if len(name.encode()) > 120:
        name = f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{name},seed={seed}" if name else f"seed={seed}"
