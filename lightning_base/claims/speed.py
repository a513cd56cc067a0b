"""How long a step of each arm takes: all arms in turns in one process, so that noise falls on all alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_base.benchmark.bare import BareLoop, configuration
from lightning_base.benchmark.machine import machine, machine_line
from lightning_base.benchmark.timing import Spread, interleaved, spread
from lightning_base.program import rank as train
from lightning_base.program.run_directory import read_json, write_json

SETTINGS = {
    "default": {name: [f"router={name}"] for name in ("base", "dense", "gated_dense", "switch", "top_k", "hash")},
    "paper": {name: [f"arm={name}"] for name in ("base", "dense", "switch", "top_2")},
}
STEPS_A_TURN = 3


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step by setting and arm, [R] rounds each, and the machine they were taken on."""

    seconds: Mapping[str, Mapping[str, list[float]]]
    machine: str

    @property
    def settings(self) -> list[str]:
        return list(self.seconds)

    def arms(self, setting: str) -> list[str]:
        return list(self.seconds[setting])

    def step(self, setting: str, arm: str) -> float:
        """The median of a step's seconds."""
        return float(np.median(self.seconds[setting][arm]))

    def ratio(self, setting: str, one: str, other: str) -> Spread:
        """The seconds of one arm over those of another, round by round."""
        return spread(np.array(self.seconds[setting][one]) / np.array(self.seconds[setting][other]))


def measure(path: Path, overrides: list[str], rounds: int = 25, seconds: float = 60.0) -> StepTimes:
    """Times every arm of every setting and keeps the result in a file.

    Args:
        path: the file; what it holds already is read instead.
        overrides: of the configuration, for all arms.
        rounds: at most.
        seconds: after which no further round of a setting begins.
    """
    if not path.exists():
        found: dict[str, Any] = {}
        for setting, arms in SETTINGS.items():
            loops = {name: BareLoop(configuration([*given, *overrides])[0]) for name, given in arms.items()}
            torch.set_num_threads(train.threads_per_rank(configuration(overrides)[0]))
            methods = {name: lambda loop=loop: loop.run(STEPS_A_TURN) for name, loop in loops.items()}
            times = interleaved(methods, rounds=rounds, seconds=seconds, title=f"time of a step, {setting}")
            found[setting] = {name: [float(t) / STEPS_A_TURN for t in values] for name, values in times.items()}
        write_json(path, {"seconds": found, "machine": machine_line(machine())})
    content = read_json(path)
    return StepTimes(content["seconds"], str(content["machine"]))
