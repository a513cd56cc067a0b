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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Protocol, runtime_checkable

import psutil

# What a rank gets to save and leave after SIGTERM, before SIGKILL; torchrun itself waits 30 s for its workers.
GRACE_SECONDS = 45
# How often a job's processes are looked up.
LOOK_SECONDS = 2
PREEMPTED = 128 + signal.SIGTERM


def command(run_directory: Path, *, devices: int, num_nodes: int, entry: str) -> list[str]:
    """The command line of a job of several ranks.

    Args:
        run_directory: holds ``.hydra/config.yaml``.
        devices: processes on this node.
        num_nodes: nodes; more than one takes NODE_RANK, MASTER_ADDR and MASTER_PORT from the environment.
        entry: the module each rank runs.
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
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={devices}", *where, *ranks]


@runtime_checkable
class Root(Protocol):
    """The first process of a tree, the leader of a session of its own: a ``subprocess.Popen``, or a forked rank."""

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float | None = None) -> int: ...


def launch(start: list[str] | Callable[[], Root], output: Path | None = None) -> tuple[int, bool]:
    """Runs a process tree to its end; a signal to this process ends the tree first.

    Args:
        start: the command line of the tree's first process, or what starts that process.
        output: the file that takes what a command line prints; None leaves it to the terminal.

    Returns:
        The tree's exit code, and whether this process was asked to stop by SIGTERM meanwhile.
    """
    with tempfile.TemporaryDirectory(prefix="lightning_base_", ignore_cleanup_errors=True) as logs:
        child = start() if callable(start) else _popen(start, logs, output)
        seen: set[psutil.Process] = set()
        try:
            with _forward_signals(child) as received:
                code = _wait(child, seen)
        finally:
            _end_group(child, seen)
    return code if code >= 0 else 128 - code, signal.SIGTERM in received


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
def _forward_signals(child: Root) -> Iterator[list[int]]:
    """While inside, SIGTERM and SIGINT reach the whole tree, and the second one kills it."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        _signal_group(child, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)
        if len(received) == 1:
            signal.alarm(GRACE_SECONDS)

    def give_up(number: int, frame: FrameType | None) -> None:
        _signal_group(child, signal.SIGKILL)

    handlers = {signal.SIGTERM: forward, signal.SIGINT: forward, signal.SIGALRM: give_up}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield received
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in received:
        raise KeyboardInterrupt


def _wait(child: Root, seen: set[psutil.Process]) -> int:
    """Waits for the root's end and remembers in ``seen`` who belonged to its tree: orphans tell nobody where from."""
    while True:
        seen.update(_descendants(child.pid))
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


def _end_group(child: Root, seen: set[psutil.Process]) -> None:
    """Kills whatever of the tree outlived its root: the process group is the job's own."""
    _signal_group(child, signal.SIGKILL)
    _kill(seen)
    child.wait()
