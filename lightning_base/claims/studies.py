"""Finished experiments as pairs of runs with the same seed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_base.results.read import LeftOut, Run
from lightning_base.results.statistics import Interval, interval
from lightning_base.results.verify import sound_runs

Number = Callable[[Run], float]
# Arms by the class of their router.
NAMES = {
    "Dense": "dense",
    "GatedDense": "gated_dense",
    "BASE": "base",
    "Switch": "switch",
    "TopK": "top_k",
    "Hash": "hash",
}
# An arm: its runs by seed.
Arm = dict[int, Run]


class MissingError(Exception):
    """An experiment, or an arm of it, that a claim needs and that has not run; one sentence."""


class Studies:
    """The experiments under one folder, read when they are asked for.

    Args:
        runs: the folder that holds a folder per experiment.
    """

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.left_out: list[LeftOut] = []
        self._read: dict[str, list[Run]] = {}

    def experiment(self, name: str) -> list[Run]:
        """The sound runs of an experiment.

        Raises:
            MissingError: it has not run.
        """
        if name not in self._read:
            if not (self.runs / name).is_dir():
                raise MissingError(f"{name} has not run: make experiment EXPERIMENT={name}")
            self._read[name], left_out = sound_runs(self.runs / name)
            self.left_out += [replace(job, name=f"{name}/{job.name}") for job in left_out]
        return self._read[name]

    def commits(self) -> dict[str, set[str]]:
        """The code that the experiments read so far were run with."""
        return {name: {str(run.manifest["git_commit"]) for run in runs} for name, runs in self._read.items()}

    def arm(self, experiment: str, router: str, where: Callable[[Run], bool] = lambda run: True, **options: Any) -> Arm:
        """The runs of one arm by seed.

        Args:
            experiment: its name.
            router: class of the router, as the ledger has it.
            where: what else has to hold of a run.
            options: configuration values that pick the arm; ``__`` stands for a dot.

        Raises:
            MissingError: there is no such run.
            ValueError: two runs with the same seed fit.
        """
        wanted = {key.replace("__", "."): value for key, value in options.items()}
        found: Arm = {}
        for run in self.experiment(experiment):
            fits = all(run.fields.get(key) == value for key, value in wanted.items())
            named = run.ledger["router"] == router and fits
            if named and where(run):
                if run.seed in found:
                    names = f"{found[run.seed].path.name} and {run.path.name}"
                    raise ValueError(f"{experiment}: {names} are both {router} {wanted}")
                found[run.seed] = run
        if not found:
            raise MissingError(f"{experiment} has no finished run of {router} {wanted or ''}".rstrip())
        return dict(sorted(found.items()))

    def either(self, experiment: str, router: str, **options: Any) -> Arm:
        """An arm of an experiment, or, where that left it out as the default, of the default comparison."""
        try:
            return self.arm(experiment, router, **options)
        except MissingError as missing:
            try:
                return self.arm("compare", router, **options)
            except MissingError:
                raise missing from None


def final_loss(run: Run) -> float:
    """Nats per token over the whole validation text, after the last step."""
    return float(run.manifest["result"]["final/loss"])


def loss_at(step: float) -> Number:
    """The validation loss at a step, between two validations on a straight line."""

    def read(run: Run) -> float:
        curve = run.series["validation/loss"]
        return float(np.interp(step, curve.steps, curve.values))

    return read


def final(name: str) -> Number:
    def read(run: Run) -> float:
        return float(run.manifest["result"][name])

    return read


def last(name: str) -> Number:
    def read(run: Run) -> float:
        value = run.last(name)
        if value is None:
            raise MissingError(f"{run.path.parent.name}/{run.path.name} has no {name}")
        return value

    return read


def mean(arm: Arm, number: Number = final_loss) -> Interval:
    """A number over the seeds of an arm."""
    return interval([number(run) for run in arm.values()])


def difference(
    one: Arm, other: Arm, number: Number = final_loss, others: Number | None = None, *, same_model: bool = True
) -> Interval:
    """``one - other`` over the seeds that both have.

    Args:
        one: an arm.
        other: the arm it is held against.
        number: what is compared.
        others: what is read from ``other``, if it is not the same.
        same_model: whether the two have to be the same model but for the router.

    Raises:
        MissingError: they share no seed.
        ValueError: they did not read the same batches, or did not start from the same shared weights.
    """
    seeds = sorted(set(one) & set(other))
    if not seeds:
        raise MissingError(f"no seed is common to seeds {list(one)} and {list(other)}")
    names = ["batch_fingerprint", "steps"] + ["initial_weights_fingerprint"] * same_model
    for seed in seeds:
        for name in names:
            if one[seed].manifest[name] != other[seed].manifest[name]:
                raise ValueError(f"{one[seed].path} and {other[seed].path} differ in {name}: they are no pair")
    return interval([number(one[seed]) - (others or number)(other[seed]) for seed in seeds])


def best(arms: Mapping[Any, Arm], number: Number = final_loss) -> Any:
    """The key of the arm with the lowest mean."""
    return min(arms, key=lambda key: mean(arms[key], number).mean)
