"""A router that kills its process with SIGKILL at the next place of a plan: a line ``place`` in the file ``plan`` here.

Copied beside a YAML into a folder of its own, where the plan is. Places: ``evaluation_N``, an evaluation after step N;
``part_N``, with half of a checkpoint's bytes written; ``rename_N`` and ``renamed_N``, before and after it is moved into
its place; ``final``, with the first rows of the final evaluation written.
"""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_base.callbacks.metrics_csv import MetricsCsv
from lightning_base.program.checkpoint import files, together
from lightning_base.routing.plan import RoutingGroups, RoutingPlan
from lightning_base.routing.switch import Switch

PLAN = Path(__file__).with_name("plan")


def reached(place: str) -> None:
    """Ends this process if this is the next place, and strikes it out, so that the next start gets further."""
    if os.environ.get("RANK", "0") != "0":
        return
    places = PLAN.read_text().split()
    if places[:1] == [place]:
        PLAN.write_text("\n".join(places[1:]))
        os.kill(os.getpid(), signal.SIGKILL)


class Killing(Switch):
    """Switch, on a clock."""

    steps: Tensor

    def __init__(self, *, num_experts: int, width: int, capacity_factor: float = 0.75) -> None:
        super().__init__(num_experts=num_experts, width=width, capacity_factor=capacity_factor)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def end_step(self, sums: dict[str, Tensor]) -> None:
        super().end_step(sums)
        self.steps += 1

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        if not self.training:
            reached(f"evaluation_{int(self.steps)}")
        return super().forward(tokens, token_ids, groups)


def step_in(path: Path) -> str:
    return path.name.removeprefix(".").removeprefix("step_").partition(".")[0]


def watch() -> None:
    """Looks at the stages of a save, and at the log."""
    write_part, commit, rename, log = files.write_part, files.commit, os.rename, MetricsCsv.log_metrics

    def write_half(temporary: Path, name: str, content: Any) -> Any:
        done = write_part(temporary, name, content)
        if PLAN.read_text().split()[:1] == [f"part_{step_in(temporary)}"]:
            os.truncate(temporary / name, done["bytes"] // 2)
            reached(f"part_{step_in(temporary)}")
        return done

    def commit_and_tell(temporary: Path, target: Path, *args: Any, **kwargs: Any) -> None:
        commit(temporary, target, *args, **kwargs)
        reached(f"renamed_{step_in(target)}")

    def tell_and_rename(source: Any, target: Any) -> None:
        if Path(target).name.startswith("step_"):
            reached(f"rename_{step_in(Path(target))}")
        rename(source, target)

    def log_and_tell(self: MetricsCsv, metrics: Any, step: int | None = None) -> None:
        log(self, metrics, step)
        if any(name.startswith("final") for name in metrics):
            reached("final")

    together.write_part, together.commit, os.rename = write_half, commit_and_tell, tell_and_rename  # type: ignore
    MetricsCsv.log_metrics = log_and_tell  # type: ignore[method-assign]


watch()
