"""Finds out which rank a job failed by, and ends the ranks that such a failure leaves behind.

When one rank dies or hangs, the others fail in the collective they wait in, so the first error is often not the cause.
"""

import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lightning_base.program.processes.heartbeat import Beat, read_beats, stack_of
from lightning_base.program.processes.launch import LOOK_SECONDS, STOP_SIGNALS
from lightning_base.program.run_directory import read_json

# What the other ranks get to fail by themselves after one has, and what one gets to leave after it has said why.
LINGER_SECONDS = 5
LEAVE_SECONDS = 15
# How gloo and NCCL put it that another rank did not come, or has gone.
TIMED_OUT = re.compile(r"time[ds]?[ -]?out", re.IGNORECASE)
IN_VAIN = re.compile(
    rf"{TIMED_OUT.pattern}|(closed|reset) by peer|broken pipe|remote process exited|Dist(Backend|Network)Error",
    re.IGNORECASE,
)
# Where a rank is that waits for others: in a collective, or in the backward pass, of which DDP's are a part.
COLLECTIVE = re.compile(
    r"distributed_c10d|functional_collectives|distributed/nn/functional|distributed/meeting|_engine_run_backward"
)


@dataclass(frozen=True)
class Verdict:
    """How a job of ranks ended.

    Args:
        error: one sentence.
        traceback: of a rank that left one.
        rank: which it was, if that is known.
        asked: a rank was asked to stop and did, at a moment with nothing to save: no failure.
    """

    error: str
    traceback: str | None = None
    rank: int | None = None
    asked: bool = False

    @property
    def certain(self) -> bool:
        """Whether a rank said what went wrong, and it was not that another one did not come."""
        return self.traceback is not None and not IN_VAIN.search(self.error)

    def fields(self) -> dict[str, Any]:
        """What status.json says of a failure."""
        return {"error": self.error, "traceback": self.traceback, "rank": self.rank}


class Watch:
    """Looks after the ranks of one node as long as they run.

    Args:
        beats: the folder of their heartbeats.
        failures: the folder in which a rank leaves what went wrong, and torchrun how ranks ended.
        record: torchrun's file.
        timeout_seconds: how long a collective waits; a stopped process that nobody waits for gets as long.
    """

    def __init__(self, beats: Path, failures: Path, record: Path, timeout_seconds: float) -> None:
        self.beats, self.failures, self.record = beats, failures, record
        self.timeout_seconds = timeout_seconds
        self._processes: dict[int, psutil.Process] = {}
        self._stopped: dict[int, int] = {}
        # By how many times the ranks had been started anew.
        self._failed_at: dict[int, float] = {}
        self._hang: dict[int, Verdict] = {}
        self._killed: set[int] = set()

    @property
    def restarts(self) -> int:
        """How many times the ranks were started anew."""
        return max((beat.restart for beat in read_beats(self.beats).values()), default=0)

    def preempted(self) -> bool:
        """Whether the ranks have stopped because they were asked to, with a checkpoint."""
        stages = [beat.stage for beat in self._current().values()]
        return bool(stages) and all(stage == "preempted" for stage in stages)

    def look(self) -> None:
        """Once every ``LOOK_SECONDS``."""
        beats = self._current()
        alive = {rank: process for rank, beat in beats.items() if (process := self._process(beat)) is not None}
        restart = max((beat.restart for beat in beats.values()), default=0)
        failed = {found["rank"]: found for found in self._left(restart)}
        now = time.monotonic()
        for rank, process in alive.items():
            self._stopped[process.pid] = self._stopped.get(process.pid, 0) + 1 if _is_stopped(process) else 0
            if restart not in self._hang and self._stopped[process.pid] * LOOK_SECONDS > self.timeout_seconds:
                self._hang[restart] = self._stands(beats[rank], stopped=True)
                self._failed_at[restart] = now - LINGER_SECONDS
        gone = [rank for rank, beat in beats.items() if rank not in alive and not beat.ended]
        if restart not in self._failed_at:
            if not failed and not gone:
                return
            self._failed_at[restart] = now
            left = {rank: beats[rank] for rank in alive if rank not in failed and not beats[rank].ended}
            hangs = self._who_hangs(left, [beat for rank, beat in beats.items() if rank not in left])
            if hangs is not None:
                self._hang[restart] = hangs
        for rank, process in alive.items():
            if now - self._failed_at[restart] >= (LEAVE_SECONDS if rank in failed else LINGER_SECONDS):
                self._killed.add(process.pid)
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def verdict(self, code: int) -> Verdict:
        """Who and what it was.

        Args:
            code: the exit code of the tree's root, 128 and the signal if one ended it.
        """
        beats = self._current()
        restart = max((beat.restart for beat in beats.values()), default=0)
        ends = {end["rank"]: end for end in read_json(self.record).get("ends", []) if end["pid"] not in self._killed}
        by_signal = code - 128 in set(signal.Signals)
        if not ends and by_signal and len(beats) == 1:
            alone = [(rank, beat.pid) for rank, beat in beats.items() if beat.pid not in self._killed]
            ends = {rank: {"rank": rank, "pid": pid, "code": 128 - code} for rank, pid in alone}
        signals = {rank: signal.Signals(-end["code"]) for rank, end in ends.items() if end["code"] < 0}
        left = self._left(restart)
        in_vain = all(IN_VAIN.search(found["error"]) for found in left)
        hang = self._hang.get(restart)
        killed = {rank: number for rank, number in signals.items() if number not in STOP_SIGNALS}
        if hang is not None and set(killed.values()) <= {signal.SIGABRT}:
            # NCCL aborts the ranks that wait.
            timed_out = [found for found in left if TIMED_OUT.search(found["error"])]
            if len(timed_out) == len(left):
                traceback = hang.traceback or next((found["traceback"] for found in left), None)
                return Verdict(hang.error, traceback, hang.rank)
        if killed and in_vain:
            rank, number = next(iter(killed.items()))
            why = ": out of memory, unless somebody did it by hand (dmesg tells)" if number == signal.SIGKILL else ""
            return Verdict(f"rank {rank} was killed by {number.name}{_where(beats.get(rank))}{why}", None, rank)
        if in_vain and signals:
            # torchrun sends SIGTERM to those it ends itself, so another signal, or an older end, is what came first.
            others = [rank for rank, number in signals.items() if number != signal.SIGTERM]
            rank = others[0] if others else next(iter(ends))
            if rank in signals:
                return Verdict(f"rank {rank} was asked to stop by {signals[rank].name}", None, rank, asked=True)
        if left:
            first = min(
                left,
                key=lambda found: (found.get("elsewhere", False), bool(IN_VAIN.search(found["error"])), found["time"]),
            )
            return Verdict(first["error"], first["traceback"], first["rank"])
        if by_signal:
            return Verdict(f"the process that starts the ranks was killed by {signal.Signals(code - 128).name}")
        return Verdict(f"the ranks ended without a Python error, with exit code {code}")

    def _current(self) -> dict[int, Beat]:
        """The beats of those started last."""
        beats = read_beats(self.beats)
        newest = max((beat.restart for beat in beats.values()), default=0)
        return {rank: beat for rank, beat in beats.items() if beat.restart == newest}

    def _left(self, restart: int) -> list[dict[str, Any]]:
        found = [read_json(path) for path in self.failures.glob("rank_*.json")]
        return [each for each in found if each and each.get("restart", 0) == restart]

    def _process(self, beat: Beat) -> psutil.Process | None:
        """A rank's process, if it lives."""
        with suppress(psutil.NoSuchProcess):
            process = self._processes.setdefault(beat.pid, psutil.Process(beat.pid))
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def _who_hangs(self, left: dict[int, Beat], others: list[Beat]) -> Verdict | None:
        """Which of the ranks that are left the others have waited for."""
        for beat in left.values():
            process = self._process(beat)
            if process is not None and _is_stopped(process):
                return self._stands(beat, stopped=True)
        place = min(((beat.round, beat.count) for beat in others if not beat.ended), default=(0, 0))
        behind = [beat for beat in left.values() if (beat.round, beat.count) < place]
        if behind:
            return self._stands(min(behind, key=lambda beat: (beat.round, beat.count)))
        for beat in left.values():
            stack = stack_of(self.beats, beat)
            if stack and not waits(stack):
                return self._stands(beat, stack=stack)
        return None

    def _stands(self, beat: Beat, *, stopped: bool = False, stack: str | None = None) -> Verdict:
        if stopped:
            return Verdict(f"rank {beat.rank} is stopped (SIGSTOP){_where(beat)}", None, beat.rank)
        stack = stack_of(self.beats, beat) if stack is None else stack
        return Verdict(f"rank {beat.rank} does not answer{_where(beat)}: it hangs there", stack or None, beat.rank)


def waits(stack: str) -> bool:
    """Whether the main thread waits for other ranks, by a dump of all threads' stacks.

    Python writes the main thread last, and the innermost call first.
    """
    main = re.split(r"^(?:Current thread|Thread) ", stack, flags=re.MULTILINE)[-1]
    return any(COLLECTIVE.search(line) for line in main.splitlines()[1:3])


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _where(beat: Beat | None) -> str:
    return "" if beat is None else f" after step {beat.step}, {beat.stage}"
