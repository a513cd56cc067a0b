"""The reference answer: scipy's rectangular assignment on the matrix with one column per place."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from lightning_base.assignment.problem import Loads


def solve_oracle(scores_TE: NDArray[np.float64], loads: Loads) -> NDArray[np.int64]:
    """Optimal expert of each token [T], O(T^3): for tests and small problems.

    A column is one place at an expert. Where T / E is not whole, every expert has ceil(T / E) columns, the last being
    its bonus place, and one dummy row for each bonus place that must stay empty: it may sit in bonus columns only.
    Raises ValueError if the forbidden pairs (-inf) leave no assignment.
    """
    T, E = scores_TE.shape
    column_expert = np.repeat(np.arange(E), loads.largest)
    columns = scores_TE[:, column_expert]
    if loads.bonus:
        is_bonus = np.concatenate([np.arange(n) == n - 1 for n in loads.largest])
        dummy = np.where(is_bonus, 0.0, -np.inf)
        columns = np.vstack([columns, np.tile(dummy, (E - loads.bonus, 1))])
    try:
        row, column = linear_sum_assignment(columns, maximize=True)
    except ValueError as error:
        raise ValueError("scores: the forbidden pairs (-inf) leave no assignment with these loads") from error
    expert = np.empty(len(columns), np.int64)
    expert[row] = column_expert[column]
    return expert[:T]
