"""An interpreter that has imported the program, and forks to run what would else start as a new one.

``python fork_server.py`` reads requests as lines of JSON and answers each with a line. In what it forks, and in all
that comes of it, ``subprocess`` starts Python by another fork: so a job's process tree, with torchrun and its ranks, is
the real one, of real processes that get real signals, and has only not imported torch and Lightning again.
"""

import atexit
import ctypes
import inspect
import json
import multiprocessing.process
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from typing import Any

IMPORTED = (
    "lightning_base.program.command",
    "lightning_base.program.rank",
    "lightning_base.program.sweep",
    "torch.distributed.run",
)
IMPORTED += ("torch.distributed.elastic.agent.server.local_elastic_agent", "torch.utils.tensorboard", "pytest")
# What a run imports on its way.
IMPORTED += (
    "lightning_base.assignment.transport",
    "numba.cpython.charseq",
    "lightning_base.data.text",
    "pyarrow.parquet",
    "PIL.PngImagePlugin",
    "torch.utils.serialization.config",
)
CALLBACKS = (
    "assignment",
    "causality",
    "communication",
    "compute_balance",
    "machine",
    "routing_change",
    "routing_gap",
    "step_time",
)
IMPORTED += tuple(f"lightning_base.callbacks.{name}" for name in CALLBACKS)

start_a_program = subprocess.Popen._execute_child  # type: ignore[attr-defined]


def execute(arguments: Sequence[str]) -> None:
    """Does in this process what ``python *arguments`` would: ``-m module``, ``-c code`` or a script."""
    given = list(arguments)
    while given[0].startswith("-") and given[0] not in ("-m", "-c"):
        if given[0] == "-u":
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        given = given[2 if given[0] == "-X" else 1 :]
    for folder in reversed(os.environ.get("PYTHONPATH", "").split(":")):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    if given[0] == "-m":
        sys.argv = given[1:]
        runpy.run_module(given[1], run_name="__main__", alter_sys=True)
    elif given[0] == "-c":
        sys.argv = ["-c", *given[2:]]
        exec(compile(given[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = given
        sys.path.insert(0, os.path.dirname(os.path.abspath(given[0])))
        runpy.run_path(given[0], run_name="__main__")


def run_to_the_end(arguments: Sequence[str]) -> None:
    """Leaves this forked process as an interpreter leaves."""
    code: Any = 0
    try:
        execute(arguments)
    except SystemExit as leave:
        code = leave.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    raise SystemExit(code if isinstance(code, int) else int(code is not None))


def forking(self: subprocess.Popen, *values: Any) -> None:
    """``Popen._execute_child`` that forks for ``python ...`` and leaves other programs to the original."""
    given = inspect.signature(start_a_program).bind(self, *values).arguments
    arguments = [os.fspath(part) for part in given["args"]] if not isinstance(given["args"], str) else []
    if not arguments or arguments[0] != sys.executable:
        start_a_program(self, *values)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    self.pid = os.fork()
    ends = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
    if self.pid == 0:
        become(
            lambda: run_to_the_end(arguments[1:]),
            files=ends,
            environment=given["env"],
            folder=given["cwd"],
            session=bool(given.get("start_new_session", given.get("unused_start_new_session"))),
            first=given["preexec_fn"],
        )
    self._child_created = True  # type: ignore[attr-defined]
    for end in ends:
        if end != -1 and end > 2:
            os.close(end)


def forking_with_descriptors(path: bytes, arguments: Sequence[str], descriptors: Sequence[int]) -> int:
    """``multiprocessing.util.spawnv_passfds`` that forks: for multiprocessing's own servers."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        # What the parent knows of its children, and a lock that it holds while it starts one.
        multiprocessing.process._children.clear()  # type: ignore[attr-defined]
        multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
        forkserver._forkserver._lock = threading.Lock()  # type: ignore[attr-defined]
        resource_tracker._resource_tracker._lock = threading.RLock()  # type: ignore[attr-defined]
        become(lambda: run_to_the_end(arguments[1:]), keep=descriptors)
    return pid


def become(
    work: Callable[[], None],
    *,
    files: Sequence[int] = (),
    keep: Sequence[int] = (),
    environment: dict[str, str] | None = None,
    folder: str | None = None,
    session: bool = False,
    first: Callable[[], None] | None = None,
) -> None:
    """Makes this forked process what a new one would be, works, and never returns."""
    code = 1
    try:
        # A server of multiprocessing's that the parent has started is no child of this process.
        forkserver._forkserver.__init__()  # type: ignore[misc]
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.alarm(0)
        for target, source in enumerate(files):
            if source != -1:
                os.dup2(source, target)
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the one that listed them is closed by now
                if int(name) > 2 and int(name) not in keep and not os.get_inheritable(int(name)):
                    os.close(int(name))
        if session:
            os.setsid()
        if environment is not None:
            os.environ.clear()
            os.environ.update({os.fsdecode(key): os.fsdecode(value) for key, value in environment.items()})
        if folder is not None:
            os.chdir(folder)
        if first is not None:
            first()
        work()
        code = 0
    except SystemExit as leave:
        code = int(leave.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def begin(request: dict[str, Any]) -> int:
    """Forks a process for a request; gives its id."""
    pid = os.fork()
    if pid:
        return pid
    files = [os.open(os.devnull, os.O_RDONLY)]
    files += [os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("stdout", "stderr")]
    subprocess.Popen._execute_child = forking  # type: ignore[attr-defined]
    multiprocessing.util.spawnv_passfds = forking_with_descriptors
    become(
        lambda: run_to_the_end(request["arguments"]),
        files=files,
        environment=request["environment"],
        folder=request["folder"],
        session=True,
    )
    return 0


def ended(pid: int, ends: dict[int, int], *, wait: bool) -> int | None:
    """The exit code of a forked process, as subprocess gives it; also takes in whoever became an orphan."""
    while pid not in ends:
        found, status = os.waitpid(-1, 0 if wait else os.WNOHANG)
        if found == 0:
            return None
        ends[found] = os.waitstatus_to_exitcode(status)
    return ends[pid]


def warm_up() -> None:
    """Everything that a run needs once, and no thread."""
    import torch

    for name in IMPORTED:
        __import__(name)
    torch.set_num_threads(1)
    from lightning_base.assignment import balanced_assignment

    for k in (1, 2):
        balanced_assignment(torch.rand(32, 8, generator=torch.Generator().manual_seed(0)), k=k)
    compose_once()
    draw_once()


def compose_once() -> None:
    """Lets Hydra build what it keeps: its plugins, the automata of its grammar, what OmegaConf knows of its classes."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from lightning_base.program.command import CONF

    overrides = [
        "router=base,switch",
        "data.corpus.files=[a/*.txt,'b c']",
        "++trainer.max_steps=4",
        "name=x-1",
        "seed=1",
    ]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
        opened = GlobalHydra.instance().hydra
        assert opened is not None
        opened.compose_config("config", ["data=text", *overrides], run_mode=RunMode.MULTIRUN)


def draw_once() -> None:
    """Lets matplotlib find its fonts and their letters."""
    from io import BytesIO

    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().set(xlabel="0123456789", title="title")
    figure.savefig(BytesIO(), format="png")


def main() -> None:
    """Answers requests until nobody is left to ask."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)
    warm_up()
    print(json.dumps("ready"), file=answers, flush=True)
    ends: dict[int, int] = {}
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        if "arguments" in request:
            answer: int | None = begin(request)
        else:
            answer = ended(request["pid"], ends, wait=request["wait"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
