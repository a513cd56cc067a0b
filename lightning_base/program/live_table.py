"""One table of all jobs of a sweep, drawn anew in its place as long as they run.

It reads the files that jobs leave in their directories. So it does not matter where they run, how many at a time, or
that ranks print: their lines go to ``output.log``.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lightning_base.program.run_directory import RunDirectory

STYLES = {"done": "green", "failed": "bold red", "preempted": "yellow", "waiting": "dim"}
# Which jobs a small window shows: what goes on, what went wrong, what comes next.
PRIORITY = ("training", "evaluating", "starting", "failed", "preempted", "waiting", "done")
# Lines of a window that hold no job: heading, rules, the line below, and the cursor's.
OTHER_LINES = 6
# The width of all columns but the job's.
NUMBERS = 50


@dataclass(frozen=True)
class Row:
    """A job as the table shows it; ``seconds`` it has taken, ``seconds_left`` of its phase."""

    label: str
    state: str
    step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    seconds: float | None = None
    seconds_left: float | None = None
    alarms: tuple[str, ...] = ()

    def cells(self) -> tuple[str, ...]:
        """The columns as text."""
        steps = "–" if self.step is None else f"{self.step}/{self.max_steps}"
        state = " ".join((self.state, *(f"ALARM={name}" for name in self.alarms)))
        return self.label, state, steps, "–" if self.loss is None else f"{self.loss:.3f}", clock(self.seconds_left)


class LiveTable:
    """A context in which the table is on the terminal; what this process prints meanwhile goes above it.

    Args:
        jobs: the directories of a sweep's jobs with what tells them apart.
        console: where to draw; stderr if nothing is said.
    """

    def __init__(self, jobs: Mapping[RunDirectory, str], console: Console | None = None) -> None:
        self.jobs = jobs
        self.console = console or Console(stderr=True)
        self.began = time.time()
        self._ended = False
        self._live = Live(console=self.console, refresh_per_second=2, get_renderable=self.table)

    def __enter__(self) -> "LiveTable":
        # Hydra announces every job on the stream it found at its start, in the middle of the table.
        for name in ("hydra", "hydra_plugins"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended = True
        self._live.stop()

    def table(self) -> Group:
        """The table as it is now; while jobs run, as many of them as fit into the window."""
        now = time.time()
        rows = [read_row(run, label, self.began, now) for run, label in self.jobs.items()]
        room = len(rows) if self._ended else max(1, self.console.height - OTHER_LINES)
        chosen = sorted(sorted(range(len(rows)), key=lambda i: PRIORITY.index(rows[i].state))[:room])
        table = Table(box=SIMPLE_HEAD)
        table.add_column("job", no_wrap=True, overflow="ellipsis", max_width=max(12, self.console.width - NUMBERS))
        table.add_column("state")
        for heading in ("step", "loss", "time left"):
            table.add_column(heading, justify="right", no_wrap=True)
        for i in chosen:
            table.add_row(*rows[i].cells(), style=STYLES.get(rows[i].state))
        # Not the table's own caption, which would be broken to the width of the table.
        return Group(table, Text(caption(rows, len(chosen)), style="italic", no_wrap=True, overflow="ellipsis"))


def read_row(run: RunDirectory, label: str, began: float, now: float) -> Row:
    """What a job's files say about it.

    Args:
        run: its directory.
        label: its name in the table.
        began: when the sweep began; what is older and not done is of an earlier attempt.
        now: the time [s since the epoch].
    """
    status = run.status()
    state = status.get("state", "waiting")
    if state != "done" and status.get("updated", 0.0) < began:
        return Row(label, "waiting")
    progress: dict[str, Any] = run.progress()
    if progress.get("time", 0.0) < status["started"]:
        progress = {}
    running = state == "running"
    left = progress.get("seconds_left") if running else None
    return Row(
        label=label,
        state=progress.get("phase", "starting") if running else state,
        step=progress.get("step"),
        max_steps=progress.get("max_steps"),
        loss=progress.get("loss"),
        seconds=now - status["started"] if running else status["seconds"],
        seconds_left=None if left is None else max(0.0, left - (now - progress["time"])),
        alarms=tuple(dict.fromkeys(alarm["name"] for alarm in status.get("alarms", []))),
    )


def caption(rows: list[Row], shown: int) -> str:
    """How many jobs are done and how long the others may take, by the mean of those that are done or run."""
    done = sum(row.state == "done" for row in rows)
    text = f"{done} of {len(rows)} jobs done"
    left = seconds_left(rows)
    if left is not None:
        text += f", about {clock(left)} left"
    return text + (f"; {len(rows) - shown} more jobs than the window has lines" if shown < len(rows) else "")


def seconds_left(rows: list[Row]) -> float | None:
    """An estimate for all jobs that are not at their end, as many at a time as run now; None if nothing is known."""
    running = [row for row in rows if row.seconds_left is not None]
    whole = [row.seconds for row in rows if row.state == "done" and row.seconds is not None]
    whole = whole or [(row.seconds or 0.0) + (row.seconds_left or 0.0) for row in running]
    waiting = sum(row.state in ("waiting", "starting") for row in rows)
    if not whole or not (running or waiting):
        return None
    total = sum(row.seconds_left or 0.0 for row in running) + waiting * sum(whole) / len(whole)
    return total / max(1, len(running))


def clock(seconds: float | None) -> str:
    """Minutes and seconds, with hours if there are any.

    >>> clock(75), clock(3675), clock(None)
    ('1:15', '1:01:15', '–')
    """
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
