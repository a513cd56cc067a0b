"""Functions called in processes of their own, which are ended if they do not answer.

They are forked from a server that has imported torch, see ``program.processes.forked``; what such a process starts,
before it computes anything, is forked from itself.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from lightning_base.program.processes.forked import end_after_parent, warm_up
from lightning_base.program.processes.launch import STOP_SIGNALS

ENTRY = "lightning_base.check_router.command"
# True in a process of this module, which has computed nothing when it starts others: it forks them by itself. A server
# that it asked would be one of its own.
_ours = False


class Ended(RuntimeError):  # noqa: N818 - as TimeoutError, it is no mistake of the caller's
    """A process has ended without an answer, or raised an error."""


class Apart:
    """A function that runs in a process of its own.

    Args:
        function: of a module; what it gives is made of plain values.
        arguments: plain values.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        if not _ours:
            warm_up(ENTRY)
        context = multiprocessing.get_context("fork" if _ours else "forkserver")
        self._answer, sender = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(target=_run, args=(sender, function, arguments))  # type: ignore[attr-defined]
        self._process.start()
        sender.close()

    def answer(self, until: float) -> Any:
        """What the function gave; the process is gone afterwards.

        Args:
            until: by ``time.monotonic()``.

        Raises:
            TimeoutError: it had not ended by then.
            Ended: it ended otherwise.
        """
        try:
            if not self._answer.poll(max(0.0, until - time.monotonic())):
                raise TimeoutError
            found = self._answer.recv()
        except EOFError:
            self._process.join(10)
            raise Ended(f"its process ended with exit code {self._process.exitcode}") from None
        finally:
            self.end()
        if isinstance(found, Ended):
            raise found
        return found

    def end(self) -> None:
        """Ends the process, if it has not ended."""
        self._process.kill()
        self._process.join(10)
        self._answer.close()


def call(function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
    """What a function gives in a process of its own; errors as those of ``Apart.answer``."""
    return Apart(function, *arguments).answer(time.monotonic() + seconds)


def _run(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _ours
    _ours = True
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # which the server holds back
    threading.Thread(target=end_after_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        found = function(*arguments)
    except BaseException as error:  # a router may raise SystemExit
        found = Ended(f"it raised {type(error).__name__}: {' '.join(str(error).split())}")
    sender.send(found)
    sender.close()
    # Gloo's threads may abort an interpreter that ends in the ordinary way.
    os._exit(0)
