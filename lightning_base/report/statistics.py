"""Differences between arms that share their seeds: intervals, and what may be said of them.

Two runs with the same seed read the same batches in the same order and start from the same shared weights, so arms are
compared seed by seed: what one seed gives to both cancels. N seeds, one difference each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The mean of N ``values`` with its t interval from ``low`` to ``high``; with one seed all but the mean is nan.

    ``spread`` is the sample standard deviation between seeds, ``p`` the two-sided probability of a mean this far from
    zero or farther, if the true one is zero (t test).
    """

    mean: float
    low: float
    high: float
    spread: float
    p: float
    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def margin(self) -> float:
        """Half the width of the t interval."""
        return (self.high - self.low) / 2

    @property
    def known(self) -> bool:
        """Whether there are seeds enough for an interval."""
        return self.n > 1

    @property
    def sign(self) -> int:
        """1 or -1 if the t interval is above or below zero, 0 if it holds zero or there is none."""
        return int(self.low > 0) - int(self.high < 0)

    def bootstrap(self) -> tuple[float, float]:
        """The percentile interval of the means of N numbers drawn again with replacement; takes milliseconds."""
        if not self.spread > 0:
            return self.low, self.high
        found = stats.bootstrap((self.values,), np.mean, method="percentile", rng=0)
        return float(found.confidence_interval.low), float(found.confidence_interval.high)


def interval(values: Sequence[float]) -> Interval:
    """The mean of one number per seed with its intervals.

    Raises:
        ValueError: there is no value, or one that is not finite.
    """
    found = np.asarray(values, dtype=np.float64)
    if not len(found) or not np.isfinite(found).all():
        raise ValueError(f"an interval needs finite numbers, at least one: {list(values)}")
    mean, kept = float(found.mean()), tuple(map(float, found))
    if len(found) == 1:
        return Interval(mean, math.nan, math.nan, math.nan, math.nan, kept)
    spread = float(found.std(ddof=1))
    if spread == 0.0:
        return Interval(mean, mean, mean, 0.0, float(mean == 0.0), kept)
    error, student = spread / math.sqrt(len(found)), stats.t(len(found) - 1)
    half = float(student.ppf((1 + CONFIDENCE) / 2)) * error
    return Interval(mean, mean - half, mean + half, spread, 2 * float(student.sf(abs(mean) / error)), kept)


def margin(values: Sequence[float]) -> float:
    """Half the width of the t interval; nan for one number, and where one is not finite."""
    return interval(values).margin if all(map(math.isfinite, values)) else math.nan


def paired(one: Sequence[float], other: Sequence[float]) -> Interval:
    """The mean of ``one - other``, seed by seed, with its intervals; both have a number for each seed, in one order."""
    if len(one) != len(other):
        raise ValueError(f"paired differences need the same seeds: {len(one)} and {len(other)} numbers")
    return interval([a - b for a, b in zip(one, other, strict=True)])


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for how many there are, in the order given (Holm 1979, A simple sequentially rejective ...).

    The smallest is multiplied by their number m, the next by m - 1, and so on; none is smaller than the one before.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, least = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = least
    return corrected
