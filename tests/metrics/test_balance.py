"""Balance of counts: known answers by hand, and independent implementations."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_base.metrics.balance import BALANCE

KNOWN = {
    "uniform": (
        [4, 4, 4, 4],
        {"max_vio": 0, "load_cv": 0, "min_load": 1, "gini": 0, "load_entropy": 1, "dead_experts": 0},
    ),
    # Mean 4; deviations 12, -4, -4, -4, so that the variance is (144 + 48) / 4 = 48 and sqrt(48) / 4 = sqrt(3).
    # Gini: the 6 ordered pairs with expert 0 differ by 16: 6 * 16 / (2 * 4 * 4 * 4).
    "collapsed": (
        [16, 0, 0, 0],
        {
            "max_vio": 3,
            "load_cv": math.sqrt(3),
            "min_load": 0,
            "gini": 3 / 4,
            "load_entropy": 0,
            "dead_experts": 3 / 4,
        },
    ),
    # Mean 6, deviations 2 and 2. Gini 2 * 4 / (2 * 2 * 2 * 6) = 1/6.
    # Entropy of (1/3, 2/3) in units of ln 2: 1/3 log2(3) + 2/3 (log2(3) - 1) = log2(3) - 2/3.
    "two-fold imbalance": (
        [4, 8],
        {
            "max_vio": 1 / 3,
            "load_cv": 1 / 3,
            "min_load": 2 / 3,
            "gini": 1 / 6,
            "load_entropy": math.log2(3) - 2 / 3,
            "dead_experts": 0,
        },
    ),
    # Mean 5; deviations 3, -1, -1, -1: variance 3. Gini: 6 ordered pairs differ by 4: 24 / (2 * 4 * 4 * 5) = 0.15.
    "one expert at twice the others": (
        [4, 4, 8, 4],
        {
            "max_vio": 0.6,
            "load_cv": math.sqrt(3) / 5,
            "min_load": 0.8,
            "gini": 0.15,
            "load_entropy": -(0.4 * math.log(0.4) + 0.6 * math.log(0.2)) / math.log(4),
            "dead_experts": 0,
        },
    ),
    "a single expert": (
        [7],
        {"max_vio": 0, "load_cv": 0, "min_load": 1, "gini": 0, "load_entropy": 1, "dead_experts": 0},
    ),
}
CASES = [
    pytest.param(name, counts, value, id=f"{name}-{case}")
    for case, (counts, values) in KNOWN.items()
    for name, value in values.items()
]


@pytest.mark.parametrize(("name", "counts", "value"), CASES)
def test_a_metric_has_its_known_answer(name: str, counts: list[int], value: float) -> None:
    assert BALANCE[name](torch.tensor(counts)).item() == pytest.approx(value, abs=1e-12)


def test_every_metric_has_known_answers() -> None:
    assert all(set(values) == set(BALANCE) for _, values in KNOWN.values())


def gini_by_pairs(n: np.ndarray) -> float:
    return float(np.abs(n[:, None] - n[None, :]).sum() / (2 * len(n) ** 2 * n.mean()))


def entropy_by_scipy(n: np.ndarray) -> float:
    return float(scipy.stats.entropy(n) / math.log(len(n))) if len(n) > 1 else 1.0


INDEPENDENT: dict[str, Callable[[np.ndarray], float]] = {
    "max_vio": lambda n: n.max() / n.mean() - 1,
    "load_cv": lambda n: float(scipy.stats.variation(n)),
    "min_load": lambda n: n.min() / n.mean(),
    "gini": gini_by_pairs,
    "load_entropy": entropy_by_scipy,
    "dead_experts": lambda n: 1 - np.count_nonzero(n) / len(n),
}
vectors = st.lists(st.integers(0, 1_000), min_size=1, max_size=12).filter(any)


@pytest.mark.parametrize("name", sorted(BALANCE))
@given(counts=vectors)
def test_a_metric_agrees_with_an_independent_implementation(name: str, counts: list[int]) -> None:
    expected = INDEPENDENT[name](np.array(counts, dtype=np.float64))
    assert BALANCE[name](torch.tensor(counts)).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", sorted(BALANCE))
@given(counts=vectors, factor=st.integers(2, 50), data=st.data())
def test_scale_and_the_order_of_experts_do_not_matter(name: str, counts: list[int], factor: int, data) -> None:
    shuffled = data.draw(st.permutations(counts))
    one, other = BALANCE[name](torch.tensor(counts)), BALANCE[name](torch.tensor(shuffled) * factor)
    assert one.item() == pytest.approx(other.item(), abs=1e-9)


@pytest.mark.parametrize("name", sorted(BALANCE))
def test_without_any_assignment_there_is_no_balance(name: str) -> None:
    assert math.isnan(BALANCE[name](torch.tensor([0, 0, 0])).item())


@pytest.mark.parametrize("name", sorted(BALANCE))
def test_leading_axes_are_separate_vectors(name: str) -> None:
    rows = torch.tensor([[[4, 8], [6, 6]], [[12, 0], [1, 11]], [[0, 0], [5, 7]]])
    values = BALANCE[name](rows)
    assert values.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            expected = BALANCE[name](rows[i, j]).item()
            assert values[i, j].item() == pytest.approx(expected, nan_ok=True)


def test_the_known_answer_tells_a_swapped_axis_apart() -> None:
    # Two groups, each with a two-fold imbalance. Read along the groups, every expert looks perfectly even.
    groups = torch.tensor([[4, 8], [4, 8]])
    assert BALANCE["max_vio"](groups).tolist() == pytest.approx([1 / 3, 1 / 3])
    assert BALANCE["max_vio"](groups.T).tolist() == [0, 0]
