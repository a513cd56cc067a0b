"""What everything around the model costs: a real run against a bare loop over the same model and data.

Shapes: R turns.
"""

import contextlib
import csv
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Float64
from numpy import ndarray
from omegaconf import OmegaConf
from tqdm import tqdm

from lightning_base.benchmark.bare import SMALL_STEP, BareLoop, configuration, prepared_corpus
from lightning_base.benchmark.ledger import Ledger, charge_module, charge_trainer
from lightning_base.benchmark.record import Form, Record, ratio_record
from lightning_base.data.loader import TrainingLoader
from lightning_base.program import rank as train
from lightning_base.program.config import Config
from lightning_base.program.processes.heartbeat import Heartbeat
from lightning_base.program.run_directory import RunDirectory

TURN = 10  # steps in turn: as many as lie between two logged steps, so that each turn holds one
WARM_UP = 2  # turns
LOAD_METRICS = ("ExpertLoadLogger", "ComputeBalance", "AssignmentMonitor", "DropByPosition")


def records(form: Form, compiled: bool) -> list[Record]:
    """The step of a real run over that of the bare loop, and what share of a bare step each of its parts takes."""
    found = []
    turns = {"full": 24, "quick": 12, "shortest": 5}[form]
    for router in ("dense", "base", "switch", "top_k") if form == "full" else ("base",):
        found += compare(router, turns, ("module.compile=true",) if compiled else ())
    return found


def compare(router: str, turns: int, overrides: tuple[str, ...] = ()) -> list[Record]:
    """Turns of a real run and of the bare loop in alternation, in one process and on the same batches.

    Args:
        router: a name in ``conf/router``.
        turns: of ``TURN`` steps each; the first ``WARM_UP`` and the last do not count.
        overrides: of the configuration, as on a command line.

    Raises:
        RuntimeError: the two did not compute the same losses.
    """
    steps = turns * TURN
    given = [f"router={router}", *SMALL_STEP, f"trainer.max_steps={steps}", "data.validation_sequences=16", *overrides]
    # Once, at the very end: neither is part of a step.
    given += [f"trainer.{what}_every_n_steps={steps}" for what in ("validate", "checkpoint")]
    config, plain = configuration(given)
    torch.set_num_threads(train.threads_per_rank(config))
    train.quiet()
    progress = tqdm(total=turns, desc=f"harness, {router}", leave=False, disable=None)
    # The run's own progress bar works as always, unseen.
    quiet_errors = contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), quiet_errors, progress:
        run = RunDirectory(Path(folder) / router)
        run.config.parent.mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(plain), run.config)
        run.write_prepared_corpus(prepared_corpus(config))
        run.write_status("running")
        turned = Turns(config, progress)
        make_data, make_module, make_trainer = train.build_data, train.build_module, train.build_trainer
        with (
            patch.object(train, "build_data", lambda *a: turned.take_data(make_data(*a))),
            patch.object(train, "build_module", lambda *a: turned.take_module(make_module(*a))),
            patch.object(train, "build_trainer", lambda *a: turned.take_trainer(make_trainer(*a))),
        ):
            # With the signs of life that a rank gives at every stage of a step.
            train.run(config, run.path, Heartbeat(run.heartbeats, 0))
        check_losses(run, turned.bare)
    return turned.records(f"{router}, width {config.model.router_width}")


class Turns:
    """Lets the bare loop take its turns while a real run waits for its next batch, and keeps both times."""

    def __init__(self, config: Config, progress: tqdm) -> None:
        self.bare, self.ledger, self.progress = BareLoop(config), Ledger(), progress
        self.real: list[float] = []
        self.alone: list[float] = []

    def take_data(self, data: pl.LightningDataModule) -> pl.LightningDataModule:
        """The run's data, whose training loader comes back with turns in it."""
        make_loader = data.train_dataloader

        def train_dataloader() -> TrainingLoader:
            loader = make_loader()
            batches = loader._batches
            loader._batches = lambda consumed: self.in_turns(batches(consumed))
            return loader

        data.train_dataloader = train_dataloader  # type: ignore[method-assign]
        return data

    def take_module(self, module: pl.LightningModule) -> pl.LightningModule:
        """The run's module, charged for its hooks."""
        charge_module(module, self.ledger)
        return module

    def take_trainer(self, trainer: pl.Trainer) -> pl.Trainer:
        """The run's trainer, its callbacks and loggers charged; checkpoint and evaluation at the end are no steps."""
        charge_trainer(trainer, self.ledger)
        trainer.test = lambda *_args, **_options: [{}]  # type: ignore[method-assign]
        trainer.save_checkpoint = lambda *_args, **_options: None  # type: ignore[method-assign]
        return trainer

    def in_turns(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of the real run."""
        began = time.perf_counter()
        for number, batch in enumerate(batches):
            if number and number % TURN == 0:
                self.real.append(time.perf_counter() - began)
                self.ledger.close_turn()
                self.alone.append(self.bare.run(TURN))
                self.progress.update()
                began = time.perf_counter()
            yield batch

    def records(self, setting: str) -> list[Record]:
        """The whole first, then its parts from the dearest to the cheapest."""
        real_R, alone_R = np.array(self.real[WARM_UP:]), np.array(self.alone[WARM_UP:])
        parts = shares(self.ledger, alone_R)
        work = shares(self.bare.ledger, alone_R)
        parts["Lightning's loop and the rest"] = (real_R - alone_R) / alone_R - sum(parts.values()) + sum(work.values())
        around_R = sum((share_R for name, share_R in parts.items() if name not in work), 0 * alone_R)
        load_R = sum((parts[name] for name in LOAD_METRICS if name in parts), 0 * alone_R)
        for name, share_R in work.items():
            # The same work: only what it takes longer is the harness, and its noise is larger than all around it.
            parts[f"work: {name}"] = parts.pop(name) - share_R

        def record(part: str, share_R: Float64[ndarray, " R"], aim: float | None = None, **more: Any) -> Record:
            return ratio_record("harness", setting, part, "time / bare step", share_R, aim=aim, **more)

        step_ms = round(1e3 * float(np.median(real_R)) / TURN, 3)
        found = [record("whole step", real_R / alone_R, 1.03, step_ms=step_ms)]
        found += [record("all around the work", around_R, 0.03), record("load metrics", load_R, 0.01)]
        for name, share_R in sorted(parts.items(), key=lambda part: -float(np.median(part[1]))):
            found.append(record(name, share_R))
        return found


def shares(ledger: Ledger, alone_R: Float64[ndarray, " R"]) -> dict[str, Float64[ndarray, " R"]]:
    """The time of each part in each turn, over the time of the bare loop."""
    turns = ledger.turns[WARM_UP:]
    names = sorted({name for turn in turns for name in turn})
    return {name: np.array([turn.get(name, 0.0) for turn in turns]) / alone_R for name in names}


def check_losses(run: RunDirectory, bare: BareLoop) -> None:
    """Raises RuntimeError unless the run logged the losses that the bare loop computed.

    Products on several threads round differently from call to call, and a token at the border of two experts makes that
    grow with every step.
    """
    with open(run.path / "metrics.csv", newline="") as file:
        logged = {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["name"] == "train/loss"}
    compared = [step for step in logged if step <= len(bare.losses)]
    for step in compared:
        alone = float(bare.losses[step - 1])
        if abs(logged[step] - alone) > 2e-4 * step * alone:
            raise RuntimeError(f"step {step}: the run has the loss {logged[step]}, the bare loop {alone}")
    if not compared:
        raise RuntimeError("the run logged no loss that could be compared with the bare loop's")
