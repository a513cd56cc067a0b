"""metrics.csv: every scalar, one row per step and metric."""

import csv
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers.logger import Logger

from lightning_base.distributed.reduction import rank_of_this_process

COLUMNS = ("step", "seconds", "name", "value")


class MetricsCsv(Logger):
    """A Lightning logger that appends ``step, seconds, name, value`` to a file, flushed at every call.

    Args:
        path: the file.
        seconds: gives the seconds of training so far.
        resumed_step: rows after this step are of a future that did not happen: they are cut when a run resumes.
    """

    def __init__(self, path: Path, seconds: Callable[[], float], resumed_step: int | None = None) -> None:
        super().__init__()
        self.path, self._seconds = path, seconds
        # Another rank would read the file before it is cut, and put it back after.
        if rank_of_this_process() == 0:
            start_csv(path, COLUMNS, resumed_step)

    @property
    def name(self) -> str:
        return "metrics_csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends one row per metric; Lightning's own ``epoch`` is always 0 here and says nothing."""
        seconds = f"{self._seconds():.3f}"
        rows = [
            (step, seconds, name, repr(float(value)))
            for name, value in metrics.items()
            if name not in ("epoch", "step")
        ]
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerows(rows)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The manifest holds the configuration."""


def start_csv(path: Path, columns: tuple[str, ...], resumed_step: int | None) -> None:
    """Writes the header, or cuts a file of an earlier part of the run to the rows up to ``resumed_step``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[list[str]] = []
    if resumed_step is not None and path.exists():
        with open(path, newline="") as file:
            reader = csv.reader(file)
            next(reader, None)
            # A row cut short by a kill is shorter than the header.
            kept = [row for row in reader if len(row) == len(columns) and int(row[0]) <= resumed_step]
    # Beside it first: a kill in between must not take the rows of hours.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(kept)
    os.replace(temporary, path)
