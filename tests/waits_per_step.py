"""Prints how often a training step makes the host wait for the device, by who asked, as JSON.

`.item()`, `bool(tensor)`, `nonzero` and boolean indexing: counted on a CPU, where they cost nothing, by watching the
operations that would wait on a GPU. Called with a folder, a router and the overrides of a small corpus.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_base.program.rank import run
from lightning_base.program.read_config import read_config
from lightning_base.program.run_directory import RunDirectory

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = str(REPOSITORY / "lightning_base")


class Waits(TorchDispatchMode):
    """Counts the operations that wait, by the function of ours that asked for them; None if it was none of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str | None] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(function, args):
            asked = asked_by()
            # AdamW keeps its count of steps on the host, wherever the weights are.
            if asked != "optim":
                self.seen[asked] += 1
        return function(*args, **(kwargs or {}))


def waits(function: Any, args: tuple[Any, ...]) -> bool:
    name = function.overloadpacket.__name__
    masked = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
    return masked or name in ("_local_scalar_dense", "nonzero", "equal")


def asked_by() -> str | None:
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/optim/" in file:
            return "optim"
        if file.startswith(PACKAGE):
            return f"{Path(file).relative_to(PACKAGE)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return None


def waits_of_a_run(folder: Path, steps: int, router: str, corpus: list[str]) -> Counter[str | None]:
    """All waits of a whole run, evaluation included, with every callback there is."""
    quiet = ["trainer.log_every_n_steps=1000", "trainer.validate_every_n_steps=1000", "trainer.progress_bar=false"]
    quiet += ["trainer.checkpoint_every_n_steps=1000"]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        overrides = [*corpus, *quiet, f"router={router}", f"trainer.max_steps={steps}", f"runs_dir={folder}"]
        plain: Any = OmegaConf.to_container(compose("config", overrides), resolve=True)
    job = RunDirectory(folder)
    job.config.parent.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(plain), job.config)
    with Waits() as counted:
        run(read_config(plain), folder)
    return counted.seen


if __name__ == "__main__":
    folder, router, *corpus = sys.argv[1:]
    waits_in_10 = waits_of_a_run(Path(folder) / "long", 10, router, corpus)
    waits_in_10.subtract(waits_of_a_run(Path(folder) / "short", 4, router, corpus))
    # What does not grow with the steps is of the start, the validation or the final evaluation.
    print(json.dumps({str(asked): more / 6 for asked, more in waits_in_10.items() if more}))
