"""Starts Python programs by forking a process that has imported everything: seconds less for each than ``subprocess``.

The tests whose subject is the start of a process use ``subprocess``; fork_server.py says what is the same here.
"""

import atexit
import inspect
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent


class Server:
    """The process that forks; one for each process of the test runner, started when it is first needed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**plain_environment(), "PYTHONPATH": str(REPOSITORY), "OMP_WAIT_POLICY": "PASSIVE"},
            cwd=REPOSITORY,
        )
        self.folder = Path(tempfile.mkdtemp(prefix="forks_"))
        atexit.register(self.close)
        # It imports, and on a new machine it compiles the solver.
        assert self.answer(timeout=600) == "ready"

    def close(self) -> None:
        """Without anybody to ask, the server ends."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()
        shutil.rmtree(self.folder)

    def ask(self, timeout: float = 120, **request: Any) -> Any:
        """The answer to a request; after a TimeoutError it is still to be read."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return self.answer(timeout)

    def answer(self, timeout: float) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        if not ready:
            raise TimeoutError(f"no answer in {timeout} s")
        return json.loads(self.process.stdout.readline())


@cache
def server_of(process: int) -> Server:
    return Server()


def server() -> Server:
    return server_of(os.getpid())


def plain_environment() -> dict[str, str]:
    """This process's environment without what a test runner or a launcher may have left in it."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in dropped}


class Forked:
    """A running ``python *arguments``, with the part of ``subprocess.Popen`` that tests use."""

    def __init__(
        self, arguments: Sequence[str | Path], *, environment: dict[str, str] | None = None, folder: Path = REPOSITORY
    ) -> None:
        self.args = [str(argument) for argument in arguments]
        self.returncode: int | None = None
        folder_of_output = tempfile.mkdtemp(dir=server().folder)
        self._files = [Path(folder_of_output, name) for name in ("stdout", "stderr")]
        self.pid: int = server().ask(
            arguments=self.args,
            environment=plain_environment() if environment is None else environment,
            folder=str(folder),
            stdout=str(self._files[0]),
            stderr=str(self._files[1]),
        )

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        if self.returncode is None:
            self.returncode = server().ask(pid=self.pid, wait=False)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Waits for its end; what it wrote to stdout and stderr.

        Raises:
            subprocess.TimeoutExpired: it took too long, and was killed with all that came of it.
        """
        if self.returncode is None:
            try:
                self.returncode = server().ask(pid=self.pid, wait=True, timeout=timeout)
            except BaseException as error:
                for process in descendants():
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                self.returncode = server().answer(timeout=30)
                raise subprocess.TimeoutExpired(self.args, timeout, *map(str.encode, self.output())) from error
        return self.output()

    def output(self) -> tuple[str, str]:
        """What it has written so far to stdout and stderr."""
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in self._files)
        return out, err


def run(
    arguments: Sequence[str | Path],
    *,
    timeout: float = 240,
    environment: dict[str, str] | None = None,
    folder: Path = REPOSITORY,
) -> subprocess.CompletedProcess:
    """Runs ``python *arguments`` to its end."""
    process = Forked(arguments, environment=environment, folder=folder)
    out, err = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_function(function: Callable[..., None], *arguments: Any) -> Forked:
    """Begins a test module's function in a process without this one's import hooks; arguments that ``repr`` shows."""
    module = inspect.getmodule(function)
    assert module is not None
    assert module.__file__ is not None
    here = Path(module.__file__).parent
    code = f"import {module.__name__} as m; m.{function.__name__}(*{arguments!r})"
    path = ":".join(map(str, (REPOSITORY, here, REPOSITORY / "tests")))
    return Forked(["-c", code], environment={**plain_environment(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})


def call(function: Callable[..., None], *arguments: Any, timeout: float = 240) -> None:
    """Calls a test module's function in a process without this one's import hooks; raises what it has written."""
    process = start_function(function, *arguments)
    _, errors = process.communicate(timeout)
    assert process.returncode == 0, errors


def call_on_two_ranks(function: Callable[..., None], *arguments: Any, timeout: float = 240) -> None:
    """Calls ``function(rank, *arguments)`` in two processes at once."""
    processes = [start_function(function, rank, *arguments) for rank in range(2)]
    ends = [(process.communicate(timeout)[1], process.returncode) for process in processes]
    assert [code for _, code in ends] == [0, 0], ends


def descendants() -> list[psutil.Process]:
    """Living processes that came of anything forked here; orphans belong to the server."""
    found = psutil.Process(server().process.pid).children(recursive=True)
    living = []
    for process in found:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living
