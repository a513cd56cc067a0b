"""The process tree of one job, from its start to a status that says how it ended.

Nothing here runs on a rank.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lightning_base.program.config import Config
from lightning_base.program.processes.forked import ForkedRank
from lightning_base.program.processes.launch import PREEMPTED, STOP_SIGNALS, Ended, command, launch
from lightning_base.program.processes.slurm import is_preempting
from lightning_base.program.processes.watch import Verdict, Watch
from lightning_base.program.run_directory import RunDirectory

RANK_ENTRY = "lightning_base.program.rank"
# What schedulers send ahead of time, and launchers such as submitit answer by requeueing the job.
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
# Set while a table of the whole sweep is on the terminal, for all processes that a launcher may run jobs in.
LIVE_TABLE = "LIGHTNING_BASE_LIVE_TABLE"

# How jobs ended on a node that does not write status.json.
ENDED_HERE: dict[RunDirectory, str] = {}


def run_tree(run: RunDirectory, config: Config, *, own_process: bool) -> str:
    """Launches the ranks, waits, and writes how it ended."""
    forget_heartbeats(run)
    record = run.failures / f"node_{node_rank(config)}.json"
    watch = Watch(run.heartbeats, run.failures, record, config.strategy.timeout_seconds)
    ended = launch_ranks(run, config, record, watch.look) if own_process else run_here(run)
    verdict = watch.verdict(ended.code) if ended.code else None
    saved = watch.preempted() or run.status().get("state") == "preempted"
    # Where nothing was saved, it was asked to stop before or after training: nothing went wrong either.
    stopped = verdict is not None and (verdict.asked or (ended.asked is not None and not verdict.certain))
    state = "preempted" if saved or stopped else "failed" if verdict is not None else "done"
    restarts = watch.restarts
    forget_heartbeats(run)
    if node_rank(config):
        # The first node writes how the job ended; here only the exit code tells.
        ENDED_HERE[run] = state
    else:
        write_end(run, state, ended, verdict, restarts)
    if ended.asked == signal.SIGINT:
        raise KeyboardInterrupt
    if ended.asked is not None or state == "preempted":
        if state == "preempted":
            requeue(ended)
        # Whoever preempts one job of a sweep wants the machine: the next one is not started.
        sys.exit(PREEMPTED)
    return state


def requeue(ended: Ended) -> None:
    """Lets the launcher that runs this process queue the job again, which ends the process; nothing without one.

    submitit answers SIGUSR2 so. Slurm may send SIGTERM instead, and takes a job that then ends by itself for done.
    """
    if ended.asked in REQUEUE_SIGNALS and callable(ended.handler):
        ended.handler(ended.asked, None)
    handler = signal.getsignal(signal.SIGUSR2)
    if ended.asked == signal.SIGTERM and callable(handler) and is_preempting():
        handler(signal.SIGUSR2, None)


def forget_heartbeats(run: RunDirectory) -> None:
    """Those of this node; other nodes may have theirs beside."""
    shutil.rmtree(run.heartbeats, ignore_errors=True)
    with suppress(OSError):
        run.heartbeats.parent.rmdir()


def launch_ranks(run: RunDirectory, config: Config, record: Path, look: Callable[[], None]) -> Ended:
    """Starts the ranks in processes of their own and waits for them."""
    trainer = config.trainer
    output = run.output if run.output.exists() else None
    if trainer.world_size == 1:
        return launch(lambda: ForkedRank(RANK_ENTRY, run.path, output), output, look)
    nodes = {"devices": trainer.devices, "num_nodes": trainer.num_nodes, "max_restarts": config.strategy.max_restarts}
    return launch(command(run.path, entry=RANK_ENTRY, record=record, **nodes), output, look)


def run_here(run: RunDirectory) -> Ended:
    """With ``debug=...`` a single job with a single rank trains in this process, where a debugger works."""
    from lightning_base.program import rank as train

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        code = train.main(run.path)
    except (KeyboardInterrupt, SystemExit):
        # Lightning leaves the second way after Ctrl-C.
        return Ended(128 + signal.SIGINT, signal.SIGINT)
    except Exception:
        code = 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code == PREEMPTED and run.status().get("signal"):
        asked = signal.Signals[run.status()["signal"]]
        return Ended(code, asked, before[asked])
    return Ended(code)


def write_end(run: RunDirectory, state: str, ended: Ended, verdict: Verdict | None, restarts: int) -> None:
    """Leaves in the run directory how the job ended, and tells the person at the terminal if it is not done."""
    more = {"restarts": restarts} if restarts else {}
    if state == "done":
        run.write_status("done", **more)
    elif state == "failed":
        assert verdict is not None
        run.write_status("failed", exit_code=ended.code, **verdict.fields(), **more)
        who = "" if verdict.rank is None or f"rank {verdict.rank}" in verdict.error else f"rank {verdict.rank}: "
        kept = " (the traceback is in its status.json)" if verdict.traceback else ""
        say(f"FAILED {shown(run.path)}: {who}{verdict.error}{kept}")
    else:
        status = run.status()
        step = status.get("step") if status.get("state") == "preempted" else None
        asked = ended.asked.name if ended.asked is not None else status.get("signal")
        run.write_status("preempted", step=step, signal=asked, **more)
        saved = "nothing was to be saved" if step is None else f"step {step} is saved"
        say(f"preempted {shown(run.path)} by {asked or 'a signal'}: {saved}, and the same command goes on from there")


def node_rank(config: Config) -> int:
    """Which of several nodes this is; 0 if there is only one."""
    return int(os.environ["NODE_RANK"]) if config.trainer.num_nodes > 1 else 0


def shown(path: Path) -> str:
    """A path as short as it can be typed."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def say(text: str) -> None:
    """One line for the person at the terminal; progress bars use the same stream. A table says it by itself."""
    if LIVE_TABLE not in os.environ:
        print(text, file=sys.stderr, flush=True)
