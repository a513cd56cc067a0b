"""The table that a sweep shows on a terminal: what it says, and that nothing disturbs it or is left of it."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forks
import program
import pytest
from rich.console import Console

from lightning_base.program.live_table import LiveTable, Row, caption, read_row, seconds_left
from lightning_base.program.run_directory import RunDirectory, write_json

BEGAN = 1000.0
INTO_TERMINAL = (
    "import os, runpy, sys; terminal = os.open({name!r}, os.O_RDWR); [os.dup2(terminal, n) for n in range(3)]; "
    "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def run_with(folder: Path, status: dict[str, Any], progress: dict[str, Any] | None = None) -> RunDirectory:
    run = RunDirectory(folder)
    write_json(folder / "status.json", status)
    if progress is not None:
        write_json(folder / "progress.json", progress)
    return run


def status(state: str, **more: Any) -> dict[str, Any]:
    return {"state": state, "started": BEGAN + 5, "updated": BEGAN + 5, "seconds": 0.0, **more}


TRAINING = {"phase": "training", "step": 30, "max_steps": 240, "loss": 5.25, "seconds_left": 70.0}


def test_a_running_job_shows_its_step_loss_and_the_time_left_since_it_wrote_that(tmp_path: Path) -> None:
    run = run_with(tmp_path, status("running"), {"time": BEGAN + 15, **TRAINING})
    row = read_row(run, "base", BEGAN, now=BEGAN + 25)
    # 70 s left, 10 s ago.
    assert row.cells() == ("base", "training", "30/240", "5.250", "1:00")
    assert row.seconds == 20


def test_progress_of_an_earlier_attempt_is_not_shown(tmp_path: Path) -> None:
    run = run_with(tmp_path, status("running"), {"time": BEGAN + 4, **TRAINING})
    assert read_row(run, "base", BEGAN, now=BEGAN + 6).cells() == ("base", "starting", "–", "–", "–")


@pytest.mark.parametrize("state", ["running", "failed", "preempted"])
def test_what_an_earlier_command_has_left_unfinished_waits(state: str, tmp_path: Path) -> None:
    run = run_with(tmp_path, status(state, updated=BEGAN - 1), {"time": BEGAN - 2, **TRAINING})
    assert read_row(run, "base", BEGAN, now=BEGAN + 1).cells() == ("base", "waiting", "–", "–", "–")


def test_what_an_earlier_command_has_done_is_done(tmp_path: Path) -> None:
    before = status("done", started=BEGAN - 90, updated=BEGAN - 30, seconds=60.0)
    run = run_with(tmp_path, before, {"time": BEGAN - 40, **TRAINING, "step": 240, "seconds_left": 1.0})
    assert read_row(run, "base", BEGAN, now=BEGAN + 1).cells() == ("base", "done", "240/240", "5.250", "–")


def test_an_alarm_stands_beside_the_state(tmp_path: Path) -> None:
    alarms = [{"name": "dead_experts", "step": 3}, {"name": "dead_experts", "step": 9}]
    run = run_with(tmp_path, status("running", alarms=alarms))
    assert read_row(run, "base", BEGAN, now=BEGAN + 9).cells()[1] == "starting ALARM=dead_experts"


def test_the_time_left_of_a_sweep_takes_the_mean_of_what_is_done() -> None:
    rows = [
        Row("a", "done", seconds=50.0),
        Row("b", "done", seconds=70.0),
        Row("c", "training", seconds=20.0, seconds_left=40.0),
        Row("d", "waiting"),
    ]
    assert seconds_left(rows) == 40 + 60
    assert caption(rows, shown=4) == "2 of 4 jobs done, about 1:40 left"
    # The first job by its own pace: 60 s each.
    assert seconds_left(rows[2:]) == 40 + 60
    # Two side by side halve it.
    side_by_side = [*rows[:2], rows[2], Row("e", "training", seconds=30.0, seconds_left=30.0), rows[3]]
    assert seconds_left(side_by_side) == (40 + 30 + 60) / 2
    assert seconds_left([Row("a", "waiting")]) is None
    assert seconds_left(rows[:2]) is None


def test_a_small_window_shows_the_jobs_that_run_and_says_how_many_it_leaves_out(tmp_path: Path) -> None:
    jobs = {}
    for i in range(40):
        done = run_with(tmp_path / f"done{i}", status("done", seconds=1.0))
        jobs[done] = f"done{i}"
    for i in range(2):  # side by side
        running = run_with(tmp_path / f"runs{i}", status("running"), {"time": BEGAN + 6, **TRAINING})
        jobs[running] = f"runs{i}"
    console = Console(width=100, height=10, record=True, file=io.StringIO())
    table = LiveTable(jobs, console)
    table.began = BEGAN
    console.print(table.table())
    shown = console.export_text()
    assert len(shown.splitlines()) <= 10
    assert "runs0" in shown
    assert "runs1" in shown
    assert "38 more jobs than the window has lines" in shown


def test_a_long_name_leaves_room_for_the_numbers(tmp_path: Path) -> None:
    run = run_with(tmp_path, status("running"), {"time": BEGAN + 6, **TRAINING})
    console = Console(width=100, height=10, record=True, file=io.StringIO())
    table = LiveTable({run: "router.capacity_factor=1.25, " * 9}, console)
    table.began = BEGAN
    console.print(table.table())
    (line,) = (line for line in console.export_text().splitlines() if "router" in line)
    assert line.split()[-4:-1] == ["training", "30/240", "5.250"]


class Terminal:
    """A terminal of 30 lines with a program on it; keeps what the program has drawn."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.slave = slave
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
        self.settings = termios.tcgetattr(slave)
        code = INTO_TERMINAL.format(name=os.ttyname(slave))
        environment = {**forks.plain_environment(), "TERM": "xterm"}
        self.process = forks.Forked(["-c", code, *program.command(*arguments)], environment=environment)
        self.drawn = ""

    def read_until(self, happened: Callable[[], bool], seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, self.drawn
            if select.select([self.master], [], [], 0.1)[0]:
                self.drawn += os.read(self.master, 65536).decode()

    def ends(self) -> int:
        self.read_until(lambda: self.process.poll() is not None)
        self.read_until(lambda: not select.select([self.master], [], [], 0.2)[0])
        assert self.process.returncode is not None
        return self.process.returncode

    def screen(self) -> list[str]:
        """The lines as they stand, after all cursor movements and erasures."""
        lines, at = [""], 0
        for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", self.drawn):
            if part == "\n":
                at += 1
                lines += [""] * (at + 1 - len(lines))
            elif part.endswith("A") and part.startswith("\x1b"):
                at -= int(part[2:-1] or 1)
            elif part == "\x1b[2K":
                lines[at] = ""
            elif not part.startswith("\x1b") and part != "\r":
                lines[at] += part
        return [line.rstrip() for line in lines]

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture(scope="module")
def swept(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Terminal, Path]]:
    """A terminal on which a sweep of two arms has run, and its runs directory."""
    folder = tmp_path_factory.mktemp("swept")
    terminal = Terminal("-m", *small_corpus, "router=uniform,hash", f"runs_dir={folder}")
    assert terminal.ends() == 0, terminal.drawn
    yield terminal, folder
    terminal.close()


def test_a_sweep_leaves_one_table_with_all_its_jobs(swept: tuple[Terminal, Path]) -> None:
    terminal, folder = swept
    screen = terminal.screen()
    assert sum("time left" in line for line in screen) == 1, "the table is drawn in its place"
    for job, path in program.jobs(folder).items():
        loss = program.series(path, "train/loss")[-1][1]
        label = "uniform" if "uniform" in job else "hash"
        (line,) = (line for line in screen if line.split()[:1] == [label])
        assert line.split() == [label, "done", "4/4", f"{loss:.3f}", "–"]
    assert any(line.startswith("2 of 2 jobs done") for line in screen)
    assert "waiting" in terminal.drawn, "it was there while jobs ran"


def test_what_the_jobs_print_goes_to_a_file_and_not_into_the_table(swept: tuple[Terminal, Path]) -> None:
    terminal, folder = swept
    assert "it/s" not in terminal.drawn
    assert "HYDRA" not in terminal.drawn
    for path in program.jobs(folder).values():
        assert (path / "output.log").is_file()
        assert program.read(path / "progress.json")["step"] == 4


def test_without_a_terminal_there_are_lines_as_ever(small_sweep: Path) -> None:
    for path in program.jobs(small_sweep.parent).values():
        assert not (path / "output.log").exists()
        assert not (path / "progress.json").exists()


def test_control_c_ends_the_table_and_leaves_the_terminal_as_it_was(small_corpus: list[str], tmp_path: Path) -> None:
    terminal = Terminal(
        "-m", *small_corpus, "trainer.max_steps=100000", "router=uniform,switch", f"runs_dir={tmp_path}"
    )
    try:
        terminal.read_until(lambda: re.search(r"training +[1-9]\d*/100000", terminal.drawn) is not None)
        os.write(terminal.master, b"\x03")
        assert terminal.ends() == 130
        assert terminal.drawn.rindex("\x1b[?25h") > terminal.drawn.rindex("\x1b[?25l"), "the cursor is back"
        assert termios.tcgetattr(terminal.slave) == terminal.settings
        assert "interrupted; what is done stays done" in terminal.screen()[-2]
    finally:
        terminal.close()
    found = {path.parent.name: program.read(path) for path in tmp_path.glob("debug/*/status.json")}
    assert [status["state"] for status in found.values()] == ["preempted"], "and the second one was not started"
