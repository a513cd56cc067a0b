"""What every token would choose at given prices, kept with the scores in the layout that makes it quick.

Legend: T tokens, E experts, K experts per token, B blocks of J tokens.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_base.assignment.passes import BLOCK, best_k, best_two, too_many, turn
from lightning_base.assignment.pool import thread_pool
from lightning_base.assignment.problem import Loads

PARALLEL = 2**21  # from so many scores on, a pass is worth several threads
EPSILON = {np.dtype(kind).char: float(np.finfo(kind).eps) for kind in (np.float32, np.float64)}


class Choice:
    """The k best experts of each token and the margin of the last of them over the next, at the prices last asked for.

    Passes run in the precision of the scores, in several threads (by default as many as torch uses) where that pays.
    Tokens do not depend on each other, so the number of threads changes nothing.
    """

    def __init__(self, scores_TE: NDArray[np.floating], k: int, threads: int | None = None) -> None:
        T, E = scores_TE.shape
        self.scores_TE = scores_TE
        self.k = k
        self.threads = threads
        self.chosen_TK = np.empty((T, k), np.int32)
        self.margin_T = np.empty(T, scores_TE.dtype)
        self.load_E = np.zeros(E, np.int64)
        self.rounding = 0.0
        self._threads = (threads or torch.get_num_threads()) if scores_TE.size >= PARALLEL else 1
        self._blocks = -(-T // BLOCK)
        if k == 1:
            self._turned_BEJ = np.empty((self._blocks, E, BLOCK), scores_TE.dtype)
            self._in_parts(self._blocks, lambda part, low, high: turn(scores_TE, low, high, self._turned_BEJ))

    def at(self, prices: NDArray[np.float64]) -> None:
        """Choose anew at these prices: one pass over the scores.

        Sets the load of each expert, and `rounding`: a margin above it is certain in spite of the pass's precision.
        """
        rounded = prices.astype(self.scores_TE.dtype)
        load_PE = np.zeros((self._threads, len(prices)), np.int64)
        found = self.chosen_TK, self.margin_T
        if self.k == 1:
            best_T = self.chosen_TK[:, 0]
            largest = self._in_parts(
                self._blocks,
                lambda part, low, high: best_two(
                    self._turned_BEJ, rounded, low, high, best_T, self.margin_T, load_PE[part]
                ),
            )
        else:
            largest = self._in_parts(
                len(self.scores_TE),
                lambda part, low, high: best_k(self.scores_TE, rounded, low, high, *found, load_PE[part]),
            )
        self.load_E = load_PE[0] if self._threads == 1 else load_PE.sum(0)
        largest_price = float(np.abs(prices).max())
        self.rounding = 8 * EPSILON[self.scores_TE.dtype.char] * (max(largest) + 3 * largest_price)

    def excess(self, loads: Loads) -> int:
        """How many tokens are too many where they are."""
        return too_many(self.load_E, loads.largest)

    def _in_parts(self, count: int, part: Callable[[int, int, int], Any]) -> list[Any]:
        if self._threads == 1:
            return [part(0, 0, count)]
        edges = [count * i // self._threads for i in range(self._threads + 1)]
        return list(thread_pool(self._threads).map(part, range(self._threads), edges[:-1], edges[1:]))
