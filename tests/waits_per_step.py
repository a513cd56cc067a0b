"""Prints how often a training step makes the host wait for the device, by who asked, as JSON.

Counted on a CPU, where they cost nothing: the operations that would wait on a GPU (`.item()`, `bool(tensor)`,
`nonzero`, boolean indexing, `unique`, ...) by watching what is dispatched, and `.cpu()`, `.tolist()` and `.numpy()`,
which dispatch nothing, by standing in their place. What was read by `.cpu()` is on the host from then on. A copy
from the host to the device is not seen. Called with a folder, a router and the overrides of a small corpus.
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


# A GPU's host has to know how many numbers they give, or what these are.
READ = ("_local_scalar_dense", "equal", "allclose", "multinomial", "bincount")
OF_UNKNOWN_SIZE = ("nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class Waits(TorchDispatchMode):
    """Counts the operations that wait, by the function of ours that asked for them; None if it was none of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str | None] = Counter()
        self.plain: dict[str, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(function, args, kwargs or {}) and not on_host(args[0]):
            self.count()
        return function(*args, **(kwargs or {}))

    def count(self) -> None:
        asked = asked_by()
        # AdamW keeps its count of steps on the host, wherever the weights are.
        if asked != "optim":
            self.seen[asked] += 1

    def __enter__(self) -> Any:
        self.plain = {name: getattr(torch.Tensor, name) for name in ("cpu", "tolist", "numpy")}

        def cpu(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            if on_host(tensor):
                return tensor
            self.count()
            here: torch.Tensor = self.plain["cpu"](tensor, *args, **options).view_as(tensor)
            here.on_host = True  # type: ignore[attr-defined]
            return here

        def read(name: str) -> Any:
            def method(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
                if not on_host(tensor):
                    self.count()
                return self.plain[name](tensor, *args, **options)

            return method

        for name, stand_in in (("cpu", cpu), ("tolist", read("tolist")), ("numpy", read("numpy"))):
            setattr(torch.Tensor, name, stand_in)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        for name, method in self.plain.items():
            setattr(torch.Tensor, name, method)
        super().__exit__(*raised)


def on_host(tensor: Any) -> bool:
    return getattr(tensor, "on_host", False)


def waits(function: Any, args: tuple[Any, ...], options: Any) -> bool:
    name = function.overloadpacket.__name__
    if name in INDEXED:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    if name == "repeat_interleave":
        # Of numbers of repeats that are on the device; their sum is the size.
        return function._overloadname in ("Tensor", "self_Tensor") and options.get("output_size") is None
    return name in READ or name in OF_UNKNOWN_SIZE


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
