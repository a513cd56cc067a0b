"""One job: from a composed configuration to a run directory that is checked, and ranks that find all they need in it.

Nothing here runs on a rank.
"""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_base.data import CorpusError, described, prepare_for_run, settled
from lightning_base.instantiation import ConfigError, plain_defaults, resolve
from lightning_base.program.checkpoint import checkpoints
from lightning_base.program.claim import InUseError, claimed, in_use, is_here_and_alive, read_owner
from lightning_base.program.config import Config
from lightning_base.program.plugins import complete
from lightning_base.program.processes.share import Share
from lightning_base.program.processes.slurm import MEETING_POINT, meeting_point
from lightning_base.program.read_config import check_devices, check_loggers, fit_schedule, read_config
from lightning_base.program.resume import NEVER, check_resume, start_over
from lightning_base.program.run_directory import EXECUTION, NAMING, RunDirectory, under
from lightning_base.program.sources import plugin_sources
from lightning_base.program.tree import LIVE_TABLE, node_rank, run_tree, say, shown
from lightning_base.routing.router import Router

# The jobs this process has taken on, for the summary of a run without a sweep.
STARTED: list[RunDirectory] = []
# The prepared corpora of this process, by the configuration of the data.
PREPARED: dict[str, str] = {}


def job(composed: DictConfig) -> float | None:
    """Runs one job to its end, unless it is done already; gives its validation loss, for sweepers that go by it."""
    plain = plain_config(composed)
    config = read_config(plain)
    hydra_config = HydraConfig.get()
    run = RunDirectory(Path(hydra_config.runtime.output_dir))
    STARTED.append(run)
    in_parent = hydra_config.mode == RunMode.RUN and hydra_config.runtime.choices.get("debug") is not None
    if hydra_config.mode == RunMode.MULTIRUN and "n_jobs" in hydra_config.launcher:
        take_share(int(hydra_config.launcher.n_jobs), config, Path(hydra_config.sweep.dir))
    check_devices(config.trainer)
    check_loggers(config.logger)
    check_nodes(config)
    own_process = not in_parent or config.trainer.world_size > 1
    if node_rank(config):
        if run.status().get("state") == "done":
            say(f"skipping {shown(run.path)}: it is done")
            return validation_loss(run)
        prepare_data(config)
        wait_for_config(run, plain, config.strategy.timeout_seconds)
        return outcome(run, run_tree(run, config, own_process=own_process))
    # Before the claim, which would leave its file in somebody else's folder, and again with it.
    check_run_directory(run, plain)
    try:
        with claimed(run.path, say):
            if not check_run_directory(run, plain):
                say(f"skipping {shown(run.path)}: it is done")
                return validation_loss(run)
            check_resume(run, config.resume)
            prepared = prepare_data(config)
            if config.resume == NEVER and not is_requeued():
                start_over(run)
            write_job(run, plain, list(hydra_config.overrides.task), prepared)
            for sentence in fit_schedule(config)[1]:
                say(sentence)
            say(f"running {shown(run.path)}")
            return outcome(run, run_tree(run, config, own_process=own_process))
    except InUseError as error:
        raise ConfigError(str(error)) from error


def outcome(run: RunDirectory, state: str) -> float | None:
    """What a sweeper is told of a job that has ended."""
    return validation_loss(run) if state == "done" else None


def validation_loss(run: RunDirectory) -> float | None:
    """Of the final evaluation; None where there is none."""
    found = run.manifest().get("result", {}).get("final/loss")
    return None if found is None else float(found)


def write_job(run: RunDirectory, plain: dict[str, Any], overrides: list[str], prepared: str) -> None:
    """Writes what every rank will read, and a status that says the job has begun."""
    run.config.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(plain), run.config)
    OmegaConf.save(OmegaConf.create(overrides), run.config.with_name("overrides.yaml"))
    run.write_prepared_corpus(prepared)
    for old in run.failures.glob("*.json"):
        old.unlink()
    run.output.unlink(missing_ok=True)
    if LIVE_TABLE in os.environ:
        run.output.touch()
    run.write_status("running")


def wait_for_config(run: RunDirectory, plain: dict[str, Any], seconds: float) -> None:
    """On a node that is not the first: waits until the first one has written the same configuration.

    Raises:
        ConfigError: it has not within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ready = run.config.exists() and run.status().get("state") == "running"
        if ready and not differing(OmegaConf.to_container(OmegaConf.load(run.config)), plain):
            return
        time.sleep(0.5)
    raise ConfigError(
        f"NODE_RANK={os.environ['NODE_RANK']}: the first node has not started this job in {shown(run.path)} within "
        f"strategy.timeout_seconds={seconds}: run the same command on every node, with runs_dir on a shared file system"
    )


def check_run_directory(run: RunDirectory, plain: dict[str, Any]) -> bool:
    """Whether there is anything left to do in a directory.

    Raises:
        ConfigError: the directory holds something else, cannot be used, or is in use.
    """
    path = shown(run.path)
    remedy = "choose another name=..., or remove it"
    try:
        if run.path.exists() and not run.path.is_dir():
            raise ConfigError(f"the run directory {path} is a file: {remedy}")
        if run.is_foreign():
            raise ConfigError(f"the run directory {path} is not empty and has no status.json of a run: {remedy}")
        state = run.status().get("state")
        if state is None:
            # Not by making it: a command that is refused leaves nothing.
            there = next(folder for folder in (run.path, *run.path.absolute().parents) if folder.exists())
            if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
                raise PermissionError(f"cannot write to {shown(there)}")
            return True
        before = OmegaConf.to_container(OmegaConf.load(run.config)) if run.config.exists() else plain
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the run directory {path} cannot be used ({error}): {remedy}") from error
    if isinstance(before, dict):
        add_younger_options(before, plain)
    owner = read_owner(run.path)
    if owner is not None and is_here_and_alive(owner):
        raise ConfigError(in_use(run.path, owner))
    if plain.get("resume") == NEVER and not is_requeued():
        return True
    # Nothing that is computed depends on how and where.
    different = {k: values for k, values in differing(before, plain).items() if not under(k, (*EXECUTION, *NAMING))}
    if different:
        texts = [f"{key}={then}, not {now}" for key, (then, now) in different.items()]
        more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
        raise ConfigError(
            f"the run directory {path} holds a run with {'; '.join(texts[:3])}{more}: choose another name=..., or "
            "start over with resume=never"
        )
    if state == "done" or checkpoints(run.checkpoints):
        check_sources(run, plain)
    return state != "done"


def check_sources(run: RunDirectory, plain: dict[str, Any]) -> None:
    """Whether the packages of others that a run's steps were computed with are the same still.

    Raises:
        ConfigError: one is another, and the run would be half of the one and half of the other.
    """
    before = run.manifest().get("sources", {})
    for key, packages in plugin_sources(plain).items():
        for package, now in packages.items():
            then = before.get(key, {}).get(package, now)
            if then != now:
                texts = [f"version {one['version']}, source {one['source_sha256'][:12]}" for one in (then, now)]
                raise ConfigError(
                    f"{key}._target_ is of {package}, which has changed since the run in {shown(run.path)} "
                    f"({texts[0]} then, {texts[1]} now): put it back, choose another name=..., or start over with "
                    "resume=never"
                )


def add_younger_options(before: dict[Any, Any], plain: Mapping[str, Any]) -> None:
    """Gives the configuration of an older run the options that have come since, where the new one has their default."""
    # What looks on changes nothing; what else there may be is none of ours.
    ours = {
        k: v for k, v in plain["callbacks"].items() if str(v.get("_target_")).startswith("lightning_base.callbacks.")
    }
    before["callbacks"] = {**before.get("callbacks", {}), **ours}
    if before["router"].get("_target_") == plain["router"]["_target_"]:
        defaults = plain_defaults(resolve(plain["router"]["_target_"], "router", Router))
        for name, value in plain["router"].items():
            if name in defaults and defaults[name] == value:
                before["router"].setdefault(name, value)


def is_requeued() -> bool:
    """Whether Slurm has started this job again by itself: then even resume=never goes on."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def differing(a: Any, b: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Both values of the dotted keys in which two plain configurations differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b), key=str)
        parts = [differing(a.get(key), b.get(key), f"{prefix}{key}.") for key in keys]
        return {key: values for part in parts for key, values in part.items()}
    # An option that is younger than the run and not used is no difference.
    return {} if a == b or (a is None and b == []) else {prefix.rstrip("."): (a, b)}


def check_nodes(config: Config) -> None:
    """Several nodes need to know of each other; where srun started them, it says so."""
    if config.trainer.num_nodes == 1:
        return
    try:
        found = meeting_point(os.environ, config.trainer.num_nodes)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    os.environ.update({name: value for name, value in found.items() if name not in os.environ})
    missing = [name for name in MEETING_POINT if name not in os.environ]
    if missing:
        raise ConfigError(
            f"trainer.num_nodes={config.trainer.num_nodes} needs the environment variables {', '.join(missing)}: "
            "set them on every node, or start one task on each with srun"
        )


def check_callbacks(config: Config) -> None:
    """Builds each callback once, for a folder that is gone afterwards: before any training, an ``__init__`` has spoken.

    Raises:
        ConfigError: of one that cannot be built.
    """
    from lightning_base.callbacks.clock import TrainingClock  # needs Lightning, which takes a moment
    from lightning_base.program.build import build_callbacks

    with TemporaryDirectory() as folder:
        build_callbacks(config, RunDirectory(Path(folder)), None, TrainingClock(config.trainer.log_every_n_steps))


def take_share(jobs_at_a_time: int, config: Config, sweep: Path) -> None:
    """Where a launcher runs jobs side by side, gives this one its cores and GPUs.

    Raises:
        ConfigError: there are not enough GPUs.
    """
    import torch

    slots = jobs_at_a_time if jobs_at_a_time > 0 else len(os.sched_getaffinity(0))
    gpus = torch.cuda.device_count() if config.trainer.accelerator != "cpu" and torch.cuda.is_available() else 0
    if gpus and slots * config.trainer.devices > gpus:
        raise ConfigError(
            f"hydra.launcher.n_jobs={jobs_at_a_time} jobs side by side with trainer.devices={config.trainer.devices} "
            f"need {slots * config.trainer.devices} GPUs, but this machine has {gpus}: run fewer at a time"
        )
    Share.take(sweep / ".slots", slots, config.trainer.devices if gpus else 0)


def prepare_data(config: Config) -> str:
    """Builds the corpus before any rank waits for it; says what is wrong with it before anything is spent.

    Returns:
        The name of its folder in ``data.cache_dir``. All jobs of a sweep with the same data get the same, so that a
        corpus that changes meanwhile does not come between its arms.
    """
    key = repr(config.data)
    if key not in PREPARED:
        corpus = config.build_corpus()
        try:
            prepared = prepare_for_run(corpus, config.data)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for line in described(prepared, config.data):
            print(f"data: {line}", file=sys.stderr)
        PREPARED[key] = prepared.folder.name
    return PREPARED[key]


def plain_config(composed: DictConfig) -> dict[str, Any]:
    """The configuration without Hydra's own part, resolved, as plain containers, with the vocabulary that it names.

    Raises:
        ConfigError: a value that has to be given is missing, or a plugin or the tokenizer cannot be used.
    """
    copied = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    complete(copied)
    missing = sorted(OmegaConf.missing_keys(copied))
    if missing:
        raise ConfigError(f"{missing[0]} is missing: give it, as {missing[0]}=...")
    container = OmegaConf.to_container(copied, resolve=True)
    assert isinstance(container, dict)
    plain = {str(key): value for key, value in container.items()}
    if not isinstance(plain.get("data"), Mapping):
        return plain  # which is refused in a sentence
    try:
        return plain | {"data": settled(plain["data"])}
    except CorpusError as error:
        raise ConfigError(str(error)) from error
