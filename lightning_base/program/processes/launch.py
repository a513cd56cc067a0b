"""Starts one job as one process tree, and leaves nothing behind when it ends.

Lightning's own launcher would replay the command line in its children, and with it a whole Hydra sweep. Here the ranks
get one argument, the run directory, and read the configuration that was composed for it.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import psutil

# What asks a job to save and leave: people, terminals, and Slurm before it takes a machine away.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# What ranks get to save and leave when asked to, before SIGKILL; and what they get when their root has died instead.
GRACE_SECONDS = 45
ORPHAN_SECONDS = 5
# How often a job's processes are looked up.
LOOK_SECONDS = 2
PREEMPTED = 128 + signal.SIGTERM


def command(
    run_directory: Path, *, devices: int, num_nodes: int, entry: str, record: Path, max_restarts: int = 0
) -> list[str]:
    """The command line of a job of several ranks.

    Args:
        run_directory: holds ``.hydra/config.yaml``.
        devices: processes on this node.
        num_nodes: nodes; more than one takes NODE_RANK, MASTER_ADDR and MASTER_PORT from the environment.
        entry: the module each rank runs.
        record: the file that says, after a failure, how ranks ended.
        max_restarts: how many times all ranks are started anew after one has failed.
    """
    ranks = ["-m", entry, str(run_directory)]
    if num_nodes == 1:
        where = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    else:
        where = [f"--nnodes={num_nodes}"] + [
            f"--{option}={os.environ[variable]}"
            for option, variable in (
                ("node-rank", "NODE_RANK"),
                ("master-addr", "MASTER_ADDR"),
                ("master-port", "MASTER_PORT"),
            )
        ]
    patience = [
        f"--max-restarts={max_restarts}",
        f"--shutdown-timeout={GRACE_SECONDS}",
        # SIGUSR1 and SIGUSR2 would end torchrun, and it alone.
        f"--signals-to-handle={','.join(number.name for number in (*STOP_SIGNALS, signal.SIGHUP, signal.SIGQUIT))}",
    ]
    agent = [sys.executable, "-m", "lightning_base.program.processes.agent", str(record)]
    return [*agent, f"--nproc-per-node={devices}", *where, *patience, *ranks]


@runtime_checkable
class Root(Protocol):
    """The first process of a tree, the leader of a session of its own: a ``subprocess.Popen``, or a forked rank."""

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float | None = None) -> int: ...


class Ended(NamedTuple):
    """How a tree ended.

    Args:
        code: the exit code of its root, 128 and more for a signal.
        asked: the signal by which this process was asked to stop meanwhile.
        handler: what would have handled that signal; it is not called yet.
    """

    code: int
    asked: signal.Signals | None = None
    handler: Any = None


def launch(
    start: list[str] | Callable[[], Root], output: Path | None = None, look: Callable[[], None] = lambda: None
) -> Ended:
    """Runs a process tree to its end; a signal of ``STOP_SIGNALS`` to this process ends the tree first.

    Args:
        start: the command line of the tree's first process, or what starts that process.
        output: the file that takes what a command line prints; None leaves it to the terminal.
        look: called every ``LOOK_SECONDS`` while the tree runs.
    """
    with tempfile.TemporaryDirectory(prefix="lightning_base_", ignore_cleanup_errors=True) as logs:
        child = start() if callable(start) else _popen(start, logs, output)
        seen: set[psutil.Process] = set()
        code: int | None = None
        try:
            with _forward_signals(child) as received:
                code = _wait(child, seen, look)
        finally:
            patience = GRACE_SECONDS if code is None or received else ORPHAN_SECONDS if code else 0
            _end_tree(child, seen, patience, ended=code is not None)
    code = code if code >= 0 else 128 - code
    return Ended(code, *received[0]) if received else Ended(code)


def die_with_parent() -> None:
    """Asks Linux to send this process SIGTERM when its parent dies, however it dies."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _popen(arguments: list[str], logs: str, output: Path | None) -> Root:
    with open(output, "ab") if output is not None else nullcontext() as file:
        return subprocess.Popen(
            arguments,
            start_new_session=True,
            preexec_fn=die_with_parent,
            env=_environment(logs),
            stdout=file,
            stderr=file,
        )


def _environment(logs: str) -> dict[str, str]:
    # torchrun would set the first itself with a warning; each rank sets its threads from the configuration. Threads
    # that sleep at a barrier instead of spinning cost a tenth on a quiet machine and save a factor of five on a busy
    # one.
    # torchrun makes a directory of its own under /tmp for every job, and leaves it there, unless it is given one.
    return {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PET_LOG_DIR": logs, **os.environ}


@contextmanager
def _forward_signals(child: Root) -> Iterator[list[tuple[signal.Signals, Any]]]:
    """While inside, the first signal reaches the whole tree as SIGTERM, and the same one again kills it.

    Another one is the same wish, of a terminal or a scheduler that tells everybody. Gives what has come, each with what
    handled it before.
    """
    received: list[tuple[signal.Signals, Any]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if any(number == other for other, _ in received):
            _signal_group(child, signal.SIGKILL)
        elif not received:
            _signal_group(child, signal.SIGTERM)
            signal.alarm(GRACE_SECONDS)
        received.append((signal.Signals(number), before[number]))

    def give_up(number: int, frame: FrameType | None) -> None:
        _signal_group(child, signal.SIGKILL)

    handlers: dict[int, Any] = {**dict.fromkeys(STOP_SIGNALS, forward), signal.SIGALRM: give_up}
    before: dict[int, Any] = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield received
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(child: Root, seen: set[psutil.Process], look: Callable[[], None]) -> int:
    """Waits for the root's end and remembers in ``seen`` who belonged to its tree: orphans tell nobody where from."""
    while True:
        seen.update(_descendants(child.pid))
        look()
        with suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=LOOK_SECONDS)


def _signal_group(child: Root, number: int) -> None:
    # torchrun puts its workers into sessions of their own: it passes SIGTERM on to them, but cannot pass on SIGKILL.
    workers = _descendants(child.pid) if number == signal.SIGKILL else []
    with suppress(ProcessLookupError):  # it may have ended meanwhile
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:  # or have been forked just now, and lead no group yet
            os.kill(child.pid, number)
    _kill(workers)


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _end_tree(child: Root, seen: set[psutil.Process], seconds: float, *, ended: bool) -> None:
    """Ends whatever of the tree is left; what can still save has ``seconds`` for it.

    Args:
        child: the root; the process group is the tree's own.
        seen: who was in the tree.
        seconds: from SIGTERM to SIGKILL.
        ended: the root has; its ranks have got SIGTERM from the system by that.
    """
    seen.update(_descendants(child.pid))
    deadline = time.monotonic() + seconds
    if not ended:
        # Somebody else's signal handler, or an error of this process, has come between.
        _signal_group(child, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=seconds)
    psutil.wait_procs(seen, timeout=max(0.0, deadline - time.monotonic()))
    _signal_group(child, signal.SIGKILL)
    _kill(seen)
    child.wait()
