"""One job's directory: its status, its manifest, and how both are written so that a crash leaves a whole file."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lightning_base.program.claim import CLAIM, RANKS

# How the same numbers are computed: by how many processes and threads, in which portions. Only speed depends on it.
EXECUTION = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.accumulate_grad_batches",
    "trainer.threads",
    "data.num_workers",
    "strategy",
)
# Names and places, and what is shown and kept: they change nothing that is computed.
NAMING = (
    "name",
    "runs_dir",
    "resume",
    "plugins",
    "data.cache_dir",
    "trainer.progress_bar",
    "trainer.keep_checkpoints",
    "logger",
)
EVENTS = "tensorboard/events.out.*"
RESERVE, RESERVED_BYTES = ".reserve", 2**16
STATES = ("running", "done", "failed", "preempted")


@dataclass(frozen=True)
class RunDirectory:
    """Paths and states of ``runs/<experiment>/<job>/``."""

    path: Path

    @property
    def config(self) -> Path:
        """Exactly what was composed, and what every rank reads."""
        return self.path / ".hydra" / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def failures(self) -> Path:
        """One file per rank that failed."""
        return self.path / "failures"

    @property
    def heartbeats(self) -> Path:
        """Where the ranks of this node say that they go on, as long as the job runs."""
        return self.path / "heartbeats" / f"node_{os.environ.get('GROUP_RANK') or os.environ.get('NODE_RANK') or 0}"

    @property
    def output(self) -> Path:
        """What the ranks print, if the terminal is taken by the table of a sweep; otherwise there is no such file."""
        return self.path / "output.log"

    def progress(self) -> dict[str, Any]:
        """How far the job is, as its first rank has written it for that table, or {}."""
        return read_json(self.path / "progress.json")

    def write_progress(self, **fields: Any) -> None:
        """Once a second: on the disk a little later will do."""
        write_json(self.path / "progress.json", {"time": time.time(), **fields}, sync=False)

    def status(self) -> dict[str, Any]:
        """What status.json says, or {} if there is none."""
        return read_json(self.path / "status.json")

    def manifest(self) -> dict[str, Any]:
        """What manifest.json says, or {} if there is none."""
        return read_json(self.path / "manifest.json")

    def write_status(self, state: str, **more: Any) -> None:
        """Writes status.json, whole or not at all; keeps when the job started and the alarms it raised."""
        assert state in STATES, state
        now, before = time.time(), self.status()
        started = now if state == "running" else before.get("started", now)
        more["alarms"] = before.get("alarms", [])
        if state == "done":
            more["manifest_sha256"] = self.seal()
        base = {"state": state, "started": started, "updated": now, "seconds": round(now - started, 1)}
        write_json(self.path / "status.json", {**base, "pid": os.getpid(), "host": socket.gethostname(), **more})

    def write_alarms(self, alarms: list[dict[str, Any]]) -> None:
        """Puts what went wrong so far into status.json and leaves the rest of it, such as whose process it is."""
        write_json(self.path / "status.json", {**self.status(), "alarms": alarms})

    def prepared_corpus(self) -> str | None:
        """The folder in ``data.cache_dir`` with the tokens of this job, as the launcher has found or built it."""
        return read_json(self.path / "corpus.json").get("folder")

    def write_prepared_corpus(self, folder: str) -> None:
        """Tells every rank, so that none of them reads the corpus to find out."""
        write_json(self.path / "corpus.json", {"folder": folder})

    def write_manifest(self, **fields: Any) -> None:
        """Adds fields to manifest.json."""
        write_json(self.path / "manifest.json", {**self.manifest(), **fields})

    def logs(self) -> dict[str, Path]:
        """The files that gain rows or events while a run trains, by their names within the directory."""
        found = [*self.path.glob("*.csv"), *self.path.glob(EVENTS)]
        return {str(path.relative_to(self.path)): path for path in sorted(found)}

    def log_sizes(self) -> dict[str, int]:
        """How long they are, in bytes, by name."""
        return {name: path.stat().st_size for name, path in self.logs().items()}

    def sync_logs(self) -> None:
        """Brings them to the disk, as a checkpoint that counts on them will be."""
        for path in self.logs().values():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())

    def cut_logs(self, sizes: Mapping[str, int]) -> None:
        """Cuts off what they have gained since they were so long; one that was not there yet is removed."""
        for name, path in self.logs().items():
            if name not in sizes:
                path.unlink()
            elif path.stat().st_size > sizes[name]:
                os.truncate(path, sizes[name])

    def reserve_room(self) -> None:
        """Takes some room on the disk, so that what went wrong can be written when there is no other."""
        (self.path / RESERVE).write_bytes(os.urandom(RESERVED_BYTES))

    def release_room(self) -> None:
        """Gives it back."""
        (self.path / RESERVE).unlink(missing_ok=True)

    def seal(self) -> str | None:
        """SHA-256 of manifest.json; status.json keeps it, so that a later change by hand shows."""
        path = self.path / "manifest.json"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

    def is_alive(self) -> bool:
        """Whether the process that wrote a ``running`` status on this machine is still there."""
        status = self.status()
        if status.get("state") != "running" or status.get("host") != socket.gethostname():
            return False
        pid = status.get("pid", -1)
        if pid == os.getpid() or not psutil.pid_exists(pid):
            return False
        try:
            # A process that started after the status was written has only inherited the number.
            return psutil.Process(pid).create_time() < status["updated"]
        except psutil.Error:
            return False

    def is_foreign(self) -> bool:
        """Whether there is something here that no job of ours left."""
        if not self.path.exists() or (self.path / "status.json").exists():
            return False
        if (self.path / CLAIM).exists() and (self.path / CLAIM).stat().st_size:
            return False  # a command that has just begun, or was killed then
        return any(path.name not in (CLAIM, RANKS) for path in self.path.iterdir())


def under(key: str, names: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of some names, or within one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or {} if the file is not there."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return found


def write_json(path: Path, content: dict[str, Any], *, sync: bool = True) -> None:
    """Writes a JSON object beside its place and moves it there; with ``sync`` it survives a crash of the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())
    os.replace(temporary, path)
