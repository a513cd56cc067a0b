"""A rank that starts no interpreter: it is forked from a server that has imported the training code already.

Importing torch and Lightning takes seconds, a fork milliseconds. The server is multiprocessing's own. It only imports,
never computes and has no threads, so forking it is safe; this process, which has routed and tokenized, is not.
"""

import importlib
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

from lightning_base.program.processes.launch import STOP_SIGNALS, die_with_parent

# What a rank imports later than at its start, beside the training code itself.
LATE = ("lightning_base.assignment.transport", "omegaconf", "PIL.Image")
# Flags of Hydra's with which a command only shows something.
SHOWS = frozenset(
    {"-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-i", "--info", "-sc", "--shell-completion"}
)
_CONTEXT = multiprocessing.get_context("forkserver")


def trains_elsewhere(arguments: Sequence[str]) -> bool:
    """Whether a command will need the server, told from its arguments before anything that takes time is imported.

    A single job with ``debug=...`` trains in the process of the command, where a debugger works. A wrong answer costs
    time and nothing else.
    """
    if any(argument.split("=")[0] in SHOWS for argument in arguments):
        return False
    in_sweep = not {"-m", "--multirun"}.isdisjoint(arguments)
    return in_sweep or not any(argument.startswith("debug=") for argument in arguments)


def warm_up(entry: str) -> None:
    """Starts the server, which imports the module ``entry`` while this process goes on."""
    _CONTEXT.set_forkserver_preload([entry, *LATE])  # without effect if it runs already
    # Held back, so that a signal to everybody, as Slurm sends it, does not end the server before its ranks have saved.
    # What it forks inherits that, until it is ready to be told.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ForkedRank:
    """The only rank of a job, as a process of its own; to ``launch`` it is like a ``subprocess.Popen``.

    Args:
        entry: the module whose function ``rank`` it runs.
        run_directory: the argument of that function.
        output: the file that takes what it prints; None leaves it to the terminal.
    """

    def __init__(self, entry: str, run_directory: Path, output: Path | None = None) -> None:
        warm_up(entry)
        # The server is told the start method of this process, and would not know that of joblib's workers.
        multiprocessing.set_start_method("forkserver", force=True)
        self._process = _CONTEXT.Process(target=_run, args=(entry, run_directory, output))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal; raises ``subprocess.TimeoutExpired``."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout or 0.0)
        return self._process.exitcode


def end_after_parent() -> None:
    command = multiprocessing.parent_process()
    if command is not None:
        command.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _run(entry: str, run_directory: Path, output: Path | None) -> None:
    os.setsid()
    if output is not None:
        with open(output, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    # As in a process of its own; the server's would leave the semaphore of every progress bar behind.
    multiprocessing.set_start_method("fork", force=True)
    die_with_parent()
    # The server takes its time to end after the command has; this rank should not train on meanwhile.
    threading.Thread(target=end_after_parent, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    importlib.import_module(entry).rank(run_directory)
