"""From the command to the first training step, seen from outside: the program runs as a user runs it.

Shapes: R repetitions.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from tqdm import tqdm

from lightning_base.benchmark.record import Form, Record, ratio_record
from lightning_base.program.run_directory import RunDirectory

ARMS = ("dense", "base", "switch")
POLL = 0.01  # seconds between two looks at the files of a run
IMPORT = "import torch"
AIM, FURTHER_AIM = 6.0, 2.0  # seconds


def records(form: Form, compiled: bool) -> list[Record]:
    """Seconds to the first step of one arm and of each further arm of a sweep; ratios are to ``import torch``.

    The corpus is prepared beforehand: an untimed run comes first.
    """
    repetitions = 5 if form == "full" else 3
    first_steps(["router=dense"])
    one, further, between, whole, imports = [], [], [], [], []
    for _ in tqdm(range(repetitions), desc="start", leave=False, disable=None):
        imports.append(seconds_of([sys.executable, "-c", IMPORT]))
        (first,), _, end = first_steps(["router=base"])
        one.append(first)
        whole.append(end)
        steps, own, _ = first_steps(["-m", f"router={','.join(ARMS)}"])
        further.append(max(own[1:]))
        between.append((steps[-1] - steps[0]) / (len(steps) - 1))
    torch_R = np.array(imports)

    def record(arm: str, seconds_R: Float64[ndarray, " R"], aim: float | None) -> Record:
        absolute = (float(np.median(seconds_R)), "s", aim)
        return ratio_record("start", "model=tiny", arm, f"seconds / {IMPORT}", seconds_R / torch_R, absolute=absolute)

    return [
        record("one arm to its first step", np.array(one), AIM),
        record(
            "the slowest further arm of three, from its own start to its first step", np.array(further), FURTHER_AIM
        ),
        record("a further arm, first step to first step, with the evaluations before", np.array(between), None),
        record("one arm of 2 steps, to the end of the command", np.array(whole), None),
        record(IMPORT, torch_R, None),
    ]


def first_steps(arguments: list[str]) -> tuple[list[float], list[float], float]:
    """Runs two steps of each arm; gives when each arm's first step was done, and when the command ended.

    A first step is done when the first training row stands in ``metrics.csv``. In seconds since the command, since the
    arm's own start as ``status.json`` has it, and since the command.

    Raises:
        RuntimeError: the program failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = ["name=start", f"runs_dir={folder}", "model=tiny", "trainer.max_steps=2", "module.warmup_steps=0"]
        command = [sys.executable, "-m", "lightning_base", "train", *arguments, *given, "trainer.log_every_n_steps=1"]
        began = time.time()  # as the status of a run has it
        seen: dict[Path, float] = {}
        with open(Path(folder) / "output", "w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
            while process.poll() is None:
                time.sleep(POLL)
                for path in Path(folder, "start").glob("*/metrics.csv"):
                    if path not in seen and "train/loss" in path.read_text():
                        seen[path] = time.time()
        if process.returncode or not seen:
            raise RuntimeError(f"{' '.join(command)} failed:\n{Path(folder, 'output').read_text()}")
        done = sorted((moment, RunDirectory(path.parent).status()["started"]) for path, moment in seen.items())
        steps, own = [moment - began for moment, _ in done], [moment - started for moment, started in done]
        return steps, own, time.time() - began


def seconds_of(command: list[str]) -> float:
    """How long a command takes."""
    began = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - began
