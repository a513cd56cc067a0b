"""Means over seeds: their intervals, and what may be said of several.

Two runs with the same seed read the same batches in the same order and start from the same shared weights, so arms are
compared seed by seed: what one seed gives to both cancels. N seeds, one difference each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
# Of what is beyond noise, as usual.
LEVEL = 0.05


@dataclass(frozen=True)
class Interval:
    """The mean of N ``values``, and half the width of its t interval; of one value all but the mean is nan.

    ``spread`` is the sample standard deviation between seeds, ``p`` the two-sided probability of a mean this far from
    zero or farther, if the true one is zero (t test).
    """

    values: tuple[float, ...]
    mean: float
    margin: float
    spread: float
    p: float

    @property
    def low(self) -> float:
        return self.mean - self.margin

    @property
    def high(self) -> float:
        return self.mean + self.margin

    @property
    def known(self) -> bool:
        """Whether there are seeds enough for an interval."""
        return len(self.values) > 1

    @property
    def decided(self) -> int:
        """1 if the mean is above zero beyond noise, -1 if below, else 0."""
        return int(math.copysign(1, self.mean)) if self.p < LEVEL else 0

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
    if not values or not np.isfinite(values).all():
        raise ValueError(f"an interval needs finite numbers, at least one: {list(values)}")
    n, mean = len(values), float(np.mean(values))
    spread = float(np.std(values, ddof=1)) if n > 1 else math.nan
    error = spread / math.sqrt(n)
    p = 2 * stats.t.sf(abs(mean) / error, n - 1) if error else mean == 0
    return Interval(tuple(values), mean, float(stats.t.isf((1 - CONFIDENCE) / 2, n - 1)) * error, spread, float(p))


def margin(values: Sequence[float]) -> float:
    """Half the width of the t interval; nan for one number, and where one is not finite."""
    return interval(values).margin if np.isfinite(values).all() else math.nan


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for how many there are, in the order given (Holm 1979, A simple sequentially rejective ...).

    The smallest is multiplied by their number m, the next by m - 1, and so on; none is smaller than the one before. A
    nan stays and is not counted.
    """
    found, order = np.array(p_values), np.argsort(p_values)
    factors = np.isfinite(found).sum() - np.arange(len(found))
    found[order] = np.maximum.accumulate(np.minimum(found[order] * factors, 1))
    return list(map(float, found))
