"""Nothing of a process tree is left, also where workers have sessions of their own and do not listen to SIGTERM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from lightning_base.program.processes.launch import LOOK_SECONDS

# As torchrun does it: a worker in a session of its own. This one is deaf, like one that hangs in a collective.
ROOT = """
import subprocess, sys, time
worker = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", worker], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""
PATIENT = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ROOT
LAUNCHER = (
    "import sys; from lightning_base.program.processes.launch import launch; code, asked, _ = launch(sys.argv[1:]); "
)
LAUNCHER += "print((code, asked is not None))"


def start(folder: Path, root: str) -> tuple[subprocess.Popen, psutil.Process]:
    """The launcher of a tree, and the deaf worker in it."""
    (folder / "root.py").write_text(root)
    arguments = [sys.executable, "-c", LAUNCHER, sys.executable, str(folder / "root.py"), str(folder / "pid")]
    launcher = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return launcher, psutil.Process(int((folder / "pid").read_text()))


def test_a_second_signal_kills_what_the_first_could_not_end(tmp_path: Path) -> None:
    launcher, worker = start(tmp_path, PATIENT)
    for _ in range(2):
        os.kill(launcher.pid, signal.SIGTERM)
        time.sleep(0.5)
    printed, _ = launcher.communicate(timeout=30)
    assert printed.strip() == f"({128 + signal.SIGKILL}, True)"
    assert psutil.wait_procs([worker], timeout=10)[1] == []


def test_a_root_that_dies_leaves_no_worker(tmp_path: Path) -> None:
    launcher, worker = start(tmp_path, ROOT)
    time.sleep(2 * LOOK_SECONDS)
    worker.parent().kill()
    printed, _ = launcher.communicate(timeout=30)
    assert printed.strip() == f"({128 + signal.SIGKILL}, False)"
    assert psutil.wait_procs([worker], timeout=10)[1] == []


def test_a_job_of_two_ranks_leaves_nothing_in_the_temporary_directory(tmp_path: Path) -> None:
    rank = "import os, sys; open(sys.argv[1] + os.environ['RANK'], 'w').close()"
    (tmp_path / "rank.py").write_text(rank)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *torchrun, str(tmp_path / "rank.py"), str(tmp_path / "was_rank_")],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        timeout=120,
    )
    assert done.stdout.splitlines() == ["(0, False)"], done.stderr
    assert sorted(path.name for path in tmp_path.glob("was_rank_*")) == ["was_rank_0", "was_rank_1"]
    assert list(temporary.iterdir()) == []
