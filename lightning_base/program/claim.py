"""One command at a time in a run directory, across processes, hosts and kills.

The claim is a lock on a file, which the system lets go of when its process ends, however it ends. The file says whose
it is and is touched every few seconds: where locks do not reach other hosts, an owner there that is alive shows too.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

CLAIM, RANKS = ".claim", ".ranks"
# An owner on another host that was silent for so long is gone.
HEARTBEAT_SECONDS, SILENT_SECONDS = 10.0, 35.0
# Ranks whose command was killed get so long to end.
RANKS_SECONDS = 60.0


class InUseError(Exception):
    """Somebody else works in a directory; one sentence says who."""


@contextmanager
def claimed(folder: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """While inside, no other command gets this folder, which is made if need be.

    Raises:
        InUseError: another one has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CLAIM
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    released = threading.Event()
    try:
        if not _lock(descriptor, fcntl.LOCK_EX):
            raise InUseError(in_use(folder, _patiently(path)))
        before = read_owner(folder)
        if before is not None and _still_there(path, before, say):
            raise InUseError(in_use(folder, before))
        _wait_for_ranks(folder, say)
        _write_owner(descriptor)
        threading.Thread(target=_beat, args=(path, released), daemon=True).start()
        try:
            yield
        finally:
            released.set()
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


@contextmanager
def as_rank(folder: Path) -> Iterator[None]:
    """While inside, a command that claims the folder waits: this rank may have outlived its own command."""
    descriptor = os.open(folder / RANKS, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def read_owner(folder: Path) -> dict[str, Any] | None:
    """Whose the claim on a folder is, or was if that process was killed; None if it was given back."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / CLAIM).read_text())
        if isinstance(found, dict) and {"host", "pid", "started"} <= found.keys():
            return found
    return None


def is_here_and_alive(owner: dict[str, Any]) -> bool:
    """Whether an owner is a living process of this host, and not this one."""
    if owner["host"] != socket.gethostname() or owner["pid"] == os.getpid():
        return False
    try:
        # Another start is another process with the same number.
        return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 1
    except psutil.Error:
        return False


def in_use(folder: Path, owner: dict[str, Any] | None) -> str:
    """The sentence for somebody who comes second."""
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    return f"the run directory {folder} is in use by {who}: wait for it or end it"


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # no locks on this file system: what the owner has written decides
    return True


def _patiently(path: Path) -> dict[str, Any] | None:
    """The owner, who may have taken the lock just now and not yet have written."""
    for _ in range(20):
        owner = read_owner(path.parent)
        if owner is not None:
            return owner
        time.sleep(0.05)
    return None


def _still_there(path: Path, owner: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Whether an owner that has not given its claim back is alive, though its lock does not say so."""
    if owner["host"] == socket.gethostname():
        return is_here_and_alive(owner)
    say(f"looking for {SILENT_SECONDS:.0f} s whether process {owner['pid']} on {owner['host']} works in {path.parent}")
    last, deadline = path.stat().st_mtime_ns, time.monotonic() + SILENT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if path.stat().st_mtime_ns != last:
            return True
    return False


def _wait_for_ranks(folder: Path, say: Callable[[str], None]) -> None:
    """Waits until ranks of a command that was killed are gone: they may still be saving."""
    descriptor = os.open(folder / RANKS, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline, said = time.monotonic() + RANKS_SECONDS, False
        while not _lock(descriptor, fcntl.LOCK_EX):
            if not said:
                say(f"waiting for the ranks of a command that was killed, which are still ending in {folder}")
                said = True
            if time.monotonic() > deadline:
                raise InUseError(
                    f"the run directory {folder} is in use by ranks of a command that was killed, for longer than "
                    f"{RANKS_SECONDS:.0f} s: end them (fuser {folder / RANKS} lists them)"
                )
            time.sleep(0.2)
    finally:
        os.close(descriptor)


def _write_owner(descriptor: int) -> None:
    process = psutil.Process()
    owner = {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _beat(path: Path, released: threading.Event) -> None:
    while not released.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)
