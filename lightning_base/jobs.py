"""One job: from a composed configuration to a process tree that has ended, and a status that says how.

Nothing here runs on a rank.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_base.claim import InUseError, claimed, in_use, is_here_and_alive, read_owner
from lightning_base.config import Config, check_devices, check_loggers, fit_schedule, read_config
from lightning_base.data import Corpus, prepare_for_run
from lightning_base.distributed.forked import ForkedRank
from lightning_base.distributed.launch import PREEMPTED, command, launch
from lightning_base.instantiation import ConfigError, instantiate
from lightning_base.resume import NEVER, check_resume, start_over
from lightning_base.run_directory import EXECUTION, RunDirectory, read_json, under

RANK_ENTRY = "lightning_base.train"
# Set while a table of the whole sweep is on the terminal, for all processes that a launcher may run jobs in.
LIVE_TABLE = "LIGHTNING_BASE_LIVE_TABLE"

# What a run that goes on may do in another way than it began: nothing that is computed depends on it.
MAY_CHANGE = (*EXECUTION, "resume", "trainer.progress_bar", "trainer.keep_checkpoints", "data.cache_dir")

# The jobs this process has taken on, for the summary of a run without a sweep.
STARTED: list[RunDirectory] = []
# The prepared corpora of this process, by the configuration of the data.
PREPARED: dict[str, str] = {}
# How jobs ended on a node that does not write status.json.
ENDED_HERE: dict[RunDirectory, str] = {}


def job(composed: DictConfig) -> str:
    """Runs one job to its end; gives the state it ended in, or ``skipped``."""
    plain = plain_config(composed)
    config = read_config(plain)
    hydra_config = HydraConfig.get()
    run = RunDirectory(Path(hydra_config.runtime.output_dir))
    STARTED.append(run)
    in_parent = hydra_config.mode == RunMode.RUN and hydra_config.runtime.choices.get("debug") is not None
    check_devices(config.trainer)
    check_loggers(config.logger)
    check_nodes(config)
    own_process = not in_parent or config.trainer.world_size > 1
    if node_rank(config):
        if run.status().get("state") == "done":
            say(f"skipping {shown(run.path)}: it is done")
            return "skipped"
        prepare_data(config)
        wait_for_config(run, plain, config.strategy.timeout_seconds)
        return run_tree(run, config, own_process=own_process)
    # Before the claim, which would leave its file in somebody else's folder, and again with it.
    check_run_directory(run, plain)
    try:
        with claimed(run.path, say):
            if not check_run_directory(run, plain):
                say(f"skipping {shown(run.path)}: it is done")
                return "skipped"
            check_resume(run, config.resume)
            prepared = prepare_data(config)
            if config.resume == NEVER and not is_requeued():
                start_over(run)
            write_job(run, plain, list(hydra_config.overrides.task), prepared)
            for sentence in fit_schedule(config)[1]:
                say(sentence)
            say(f"running {shown(run.path)}")
            return run_tree(run, config, own_process=own_process)
    except InUseError as error:
        raise ConfigError(str(error)) from error


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
        if ready and not differing_keys(OmegaConf.to_container(OmegaConf.load(run.config)), plain):
            return
        time.sleep(0.5)
    raise ConfigError(
        f"NODE_RANK={os.environ['NODE_RANK']}: the first node has not started this job in {shown(run.path)} within "
        f"strategy.timeout_seconds={seconds}: run the same command on every node, with runs_dir on a shared file system"
    )


def run_tree(run: RunDirectory, config: Config, *, own_process: bool) -> str:
    """Launches the ranks, waits, and writes how it ended."""
    interrupted = terminated = False
    try:
        if own_process:
            trainer = config.trainer
            several = command(run.path, devices=trainer.devices, num_nodes=trainer.num_nodes, entry=RANK_ENTRY)
            alone = trainer.world_size == 1
            output = run.output if run.output.exists() else None
            code, terminated = launch((lambda: ForkedRank(RANK_ENTRY, run.path, output)) if alone else several, output)
        else:
            code = run_here(run)
    except KeyboardInterrupt:
        interrupted, code = True, 130
    state = run.status().get("state")
    if node_rank(config):
        # The first node writes how the job ended; here only the exit code tells.
        state = {0: "done", PREEMPTED: "preempted"}.get(code, "failed")
        ENDED_HERE[run] = state
    elif code == 0:
        run.write_status("done")
        state = "done"
    elif terminated and state != "preempted":
        # Asked to stop before or after the training loop: nothing went wrong, and the same command goes on.
        run.write_status("preempted")
        state = "preempted"
    elif state != "preempted":
        failure = first_failure(run)
        run.write_status("failed", exit_code=code, **failure)
        say(f"FAILED {shown(run.path)}: {failure['error']} (the traceback is in its status.json)")
        state = "failed"
    if interrupted:
        raise KeyboardInterrupt
    if terminated or state == "preempted":
        # Whoever preempts one job of a sweep wants the machine: the next one is not started.
        sys.exit(PREEMPTED)
    return str(state)


def run_here(run: RunDirectory) -> int:
    """With ``debug=...`` a single job with a single rank trains in this process, where a debugger works."""
    from lightning_base import train

    try:
        return train.main(run.path)
    except KeyboardInterrupt:
        raise
    except SystemExit as error:
        # Lightning leaves this way after Ctrl-C.
        raise KeyboardInterrupt from error
    except Exception:
        return 1


def first_failure(run: RunDirectory) -> dict[str, Any]:
    """What the rank that failed first has left; other ranks often fail only because that one is gone."""
    found = [read_json(path) for path in run.failures.glob("rank_*.json")]
    if not found:
        error = "the process ended without a Python error: killed, or out of memory"
        return {"error": error, "traceback": None, "rank": None}
    first = min(found, key=lambda failure: failure["time"])
    return {key: first[key] for key in ("error", "traceback", "rank")}


def check_run_directory(run: RunDirectory, plain: dict[str, Any]) -> bool:
    """Whether there is anything left to do in a directory.

    Raises:
        ConfigError: the directory holds something else, cannot be used, or is in use.
    """
    path = shown(run.path)
    remedy = "choose another name=..., or remove it (make experiment FRESH=1 does)"
    try:
        if run.path.exists() and not run.path.is_dir():
            raise ConfigError(f"the run directory {path} is a file: {remedy}")
        if run.is_foreign():
            raise ConfigError(f"the run directory {path} is not empty and has no status.json of a run: {remedy}")
        state = run.status().get("state")
        if state is None:
            run.path.mkdir(parents=True, exist_ok=True)
            if not os.access(run.path, os.W_OK | os.X_OK):
                raise PermissionError(f"cannot write to {path}")
            return True
        before = OmegaConf.to_container(OmegaConf.load(run.config)) if run.config.exists() else plain
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the run directory {path} cannot be used ({error}): {remedy}") from error
    owner = read_owner(run.path)
    if owner is not None and is_here_and_alive(owner):
        raise ConfigError(in_use(run.path, owner))
    if plain.get("resume") == NEVER and not is_requeued():
        return True
    different = [key for key in differing_keys(before, plain) if not under(key, MAY_CHANGE)]
    if different:
        raise ConfigError(f"the run directory {path} holds a run with another {', '.join(different)}: {remedy}")
    return state != "done"


def is_requeued() -> bool:
    """Whether Slurm has started this job again by itself: then even resume=never goes on."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def differing_keys(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two plain configurations."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b), key=str)
        return [found for key in keys for found in differing_keys(a.get(key), b.get(key), f"{prefix}{key}.")]
    # An option that is younger than the run and not used is no difference.
    return [] if a == b or (a is None and b == []) else [prefix.rstrip(".")]


def node_rank(config: Config) -> int:
    """Which of several nodes this is; 0 if there is only one."""
    return int(os.environ["NODE_RANK"]) if config.trainer.num_nodes > 1 else 0


def check_nodes(config: Config) -> None:
    """Several nodes need to know of each other."""
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if config.trainer.num_nodes > 1 and missing:
        raise ConfigError(
            f"trainer.num_nodes={config.trainer.num_nodes} needs the environment variables {', '.join(missing)}: "
            "set them on every node"
        )


def prepare_data(config: Config) -> str:
    """Builds the corpus before any rank waits for it; says what is wrong with it before anything is spent.

    Returns:
        The name of its folder in ``data.cache_dir``. All jobs of a sweep with the same data get the same, so that a
        corpus that changes meanwhile does not come between its arms.
    """
    key = repr(config.data)
    if key not in PREPARED:
        corpus = instantiate(config.data.corpus, "data.corpus", Corpus)
        try:
            PREPARED[key] = prepare_for_run(corpus, config.data).folder.name
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return PREPARED[key]


def plain_config(composed: DictConfig) -> dict[str, Any]:
    """The configuration without Hydra's own part, resolved, as plain containers.

    Raises:
        ConfigError: a value that has to be given is missing.
    """
    copied = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    missing = sorted(OmegaConf.missing_keys(copied))
    if missing:
        raise ConfigError(f"{missing[0]} is missing: give it, as {missing[0]}=...")
    container = OmegaConf.to_container(copied, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def shown(path: Path) -> str:
    """A path as short as it can be typed."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def say(text: str) -> None:
    """One line for the person at the terminal; progress bars use the same stream. A table says it by itself."""
    if LIVE_TABLE not in os.environ:
        print(text, file=sys.stderr, flush=True)
