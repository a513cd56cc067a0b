"""How far each rank is, for whoever launched it: one line in a small file, written anew at every stage of a step."""

import faulthandler
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

# Asks a rank for the stack of its threads; ignored by a process that has not begun to beat.
SHOW_STACK = signal.SIGURG
# The stages in which a rank has come to its end, well.
ENDS = ("done", "preempted")


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of life.

    Args:
        rank: which.
        pid: its process.
        restart: how many times the ranks were started anew before.
        round: micro batches and evaluations begun; equal on all ranks that are equally far.
        count: beats within the round.
        step: optimizer steps done.
        time: of the clock that all processes of a machine share [s].
        stage: what it does.
    """

    rank: int
    pid: int
    restart: int
    round: int
    count: int
    step: int
    time: float
    stage: str

    @property
    def ended(self) -> bool:
        """Whether the rank has come to its end, well."""
        return self.stage in ENDS


class Heartbeat:
    """A rank's side: ``beat`` costs a write of a few bytes, without a system call that waits for a disk."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / f"rank_{rank}", os.O_WRONLY | os.O_CREAT, 0o644)
        self._restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        self._round = self._count = 0
        # Kept open: what is in it is written from within a signal handler.
        self._stack: TextIO = open(folder / f"rank_{rank}.stack", "w")  # noqa: SIM115
        faulthandler.register(SHOW_STACK, file=self._stack, all_threads=True, chain=False)

    def beat(self, stage: str, step: int | None = None, *, new_round: bool = False) -> None:
        """Says that a stage begins, after ``step`` optimizer steps, or as many as before."""
        self.step = self.step if step is None else step
        if new_round:
            self._round, self._count = self._round + 1, 0
        self._count += 1
        numbers = f"{os.getpid():10d} {self._restart:4d} {self._round:12d} {self._count:10d} {self.step:12d}"
        os.pwrite(self._file, f"{numbers} {time.monotonic():20.6f} {stage:<30.30}\n".encode(), 0)


def read_beats(folder: Path) -> dict[int, Beat]:
    """The last beat of every rank that has left one on this file system."""
    found = {}
    for path in folder.glob("rank_*"):
        if path.suffix:
            continue
        fields = path.read_text().split(maxsplit=6)
        if len(fields) == 7:
            rank = int(path.name.removeprefix("rank_"))
            pid, restart, round_, count, step = map(int, fields[:5])
            found[rank] = Beat(rank, pid, restart, round_, count, step, float(fields[5]), fields[6].strip())
    return found


def stack_of(folder: Path, beat: Beat, seconds: float = 1.0) -> str:
    """Asks a rank where it is; an empty text if it does not answer.

    Args:
        folder: of the heartbeats.
        beat: the rank's.
        seconds: how long to wait.
    """
    path = folder / f"rank_{beat.rank}.stack"
    before = path.stat().st_size if path.exists() else 0
    try:
        os.kill(beat.pid, SHOW_STACK)
    except ProcessLookupError:
        return ""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if path.exists() and path.stat().st_size > before:
            time.sleep(0.1)  # it writes line by line
            return path.read_text(errors="replace")[before:].strip()
    return ""
