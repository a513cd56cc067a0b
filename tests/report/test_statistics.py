"""Intervals and corrections against tables, by hand, and against an independent implementation."""

import itertools
import math
import statistics

import pytest

from lightning_base.results.statistics import holm, interval


def test_the_interval_is_the_one_of_the_t_table() -> None:
    found = interval([1.0, 2.0, 3.0])
    # mean 2, standard deviation 1, standard error 1 / sqrt(3); t(0.975, 2 degrees) = 4.3027 in any table.
    assert found.mean == 2.0
    assert found.spread == pytest.approx(1.0)
    assert found.low == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-4)
    assert found.high == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4)
    # t = 2 sqrt(3) with 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2).
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert found.low < 0 < found.high


def test_the_bootstrap_is_near_the_exact_one() -> None:
    values = [1.0, 2.0, 3.0, 7.0]
    means = sorted(statistics.fmean(drawn) for drawn in itertools.product(values, repeat=4))
    low, high = means[int(0.025 * len(means))], means[int(0.975 * len(means))]
    # Means of four of these lie a quarter apart.
    assert interval(values).bootstrap() == (pytest.approx(low, abs=0.26), pytest.approx(high, abs=0.26))


def test_pairs_take_out_what_the_seeds_share() -> None:
    one, other = (4.0, 5.1, 6.0), (3.9, 4.99, 5.9)
    found = interval([a - b for a, b in zip(one, other, strict=True)])
    assert found.mean == pytest.approx((0.1 + 0.11 + 0.1) / 3)
    assert found.spread < 0.01
    assert found.low > 0
    assert interval(one).low < interval(other).high


def test_one_seed_says_nothing() -> None:
    found = interval([0.5])
    assert found.mean == 0.5
    assert not found.known
    assert math.isnan(found.low)
    assert math.isnan(found.p)


def test_equal_numbers_have_no_spread() -> None:
    assert (interval([0.0, 0.0]).margin, interval([0.0, 0.0]).p) == (0.0, 1.0)
    assert (interval([2.0, 2.0]).low, interval([2.0, 2.0]).p) == (2.0, 0.0)
    assert interval([2.0, 2.0]).bootstrap() == (2.0, 2.0)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_is_no_number_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        interval(values)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03 become 3 x 0.01, 2 x 0.02 and 1 x 0.03, which may not be below the one before.
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
