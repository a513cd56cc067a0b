"""A run says how fast the machine was, at a known price, and nothing of it reaches the training."""

from pathlib import Path

import torch

from lightning_base.callbacks.machine import SHARE, work
from lightning_base.results.read import read_series


def test_the_piece_of_work_draws_nothing_and_stays_finite() -> None:
    before = torch.get_rng_state()
    assert work(torch.device("cpu")) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_every_run_times_the_machine_after_its_first_step_and_spends_little_on_it(small_sweep: Path) -> None:
    runs = [read_series(path) for path in small_sweep.glob("*/metrics.csv")]
    assert len(runs) == 2
    for series in runs:
        timed, logged = series["machine/reference_ms"], series["train/step_time"]
        assert timed.steps[0] == 1
        assert set(timed.steps) <= set(logged.steps)
        # All but the last were begun while the share was not yet spent.
        assert timed.values[:-1].sum() / 1e3 <= SHARE * timed.seconds[-1]


def test_the_time_of_the_piece_of_work_is_not_in_the_clock(small_sweep: Path) -> None:
    for path in small_sweep.glob("*/metrics.csv"):
        series = read_series(path)
        timed, logged = series["machine/reference_ms"], series["train/step_time"]
        for step, seconds in zip(timed.steps, timed.seconds, strict=True):
            assert seconds == logged.seconds[logged.steps == step][0]
