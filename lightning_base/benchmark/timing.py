"""Times that can be compared on a noisy machine: all methods in turn, round after round, and ratios within a round.

Shapes: R rounds.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray
from tqdm import tqdm

Method = Callable[[], object]
SLOW = 3.0
Seconds = dict[str, Float64[ndarray, " R"]]  # by method


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float


def spread(values_R: Float64[ndarray, " R"]) -> Spread:
    """Median and quartiles of the values that are numbers."""
    low, middle, high = np.quantile(values_R[~np.isnan(values_R)], (0.25, 0.5, 0.75))
    return Spread(float(middle), float(low), float(high))


def interleaved(
    methods: Mapping[str, Method],
    *,
    rounds: int,
    seconds: float,
    device: torch.device | str = "cpu",
    title: str = "",
    slow_every: int = 1,
) -> Seconds:
    """Seconds of each method in each round; in every round each method runs once, in another order.

    What disturbs the machine for longer than a round disturbs all methods alike, so that ratios within a round keep
    their meaning when times do not.

    Args:
        methods: by name; each runs once beforehand, untimed.
        rounds: R, at most.
        seconds: no further round begins after this time; at least three do.
        device: what is waited for before the clock is read.
        title: of the progress bar.
        slow_every: a method that takes ``SLOW`` times as long as most in the first round runs in every so manieth
            round alone; in the others it has NaN.
    """
    order, draw = list(methods), random.Random(0)
    for method in methods.values():
        method()
    taken: dict[str, list[float]] = {name: [] for name in order}
    slow: set[str] = set()
    began = time.perf_counter()
    for done in tqdm(range(rounds), desc=title, leave=False, disable=None):
        if done >= 3 and time.perf_counter() - began > seconds:
            break
        draw.shuffle(order)
        for name in order:
            if name in slow and done % slow_every:
                taken[name].append(float("nan"))
                continue
            start = now(device)
            methods[name]()
            taken[name].append(now(device) - start)
        if done == 0:
            usual = float(np.median([times[0] for times in taken.values()]))
            slow = {name for name, times in taken.items() if times[0] > SLOW * usual}
    return {name: np.array(times) for name, times in taken.items()}


def now(device: torch.device | str) -> float:
    """Seconds on a monotonic clock, once the device has done all it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
