"""What every token would choose at given prices, kept with the scores in the layout that makes it quick.

Legend: T tokens, E experts, K experts per token, B blocks of J tokens.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_base.assignment.passes import BLOCK, best_k, best_two, turn
from lightning_base.assignment.problem import Loads

PARALLEL = 2**21  # from so many scores on, a pass is worth several threads


class Choice:
    """The k best experts of each token and the margin of the last of them over the next, at the prices last asked for.

    Passes run in the precision of the scores, in several threads (as many as torch uses) where that pays. Tokens do not
    depend on each other, so the number of threads changes nothing.
    """

    def __init__(self, scores_TE: NDArray[np.floating], k: int) -> None:
        T, E = scores_TE.shape
        self.scores_TE = scores_TE
        self.k = k
        self.chosen_TK = np.zeros((T, k), np.int32)
        self.margin_T = np.zeros(T, scores_TE.dtype)
        blocks = -(-T // BLOCK)
        self._turned_BEJ = np.empty((blocks if k == 1 else 0, E, BLOCK), scores_TE.dtype)
        if k == 1:
            self._in_parts(blocks, lambda low, high: turn(scores_TE, low, high, self._turned_BEJ))

    def at(self, prices: NDArray[np.float64]) -> None:
        """Choose anew at these prices: one pass over the scores."""
        rounded = prices.astype(self.scores_TE.dtype)
        if self.k == 1:
            best = self.chosen_TK[:, 0]
            self._in_parts(
                len(self._turned_BEJ),
                lambda low, high: best_two(self._turned_BEJ, rounded, low, high, best, self.margin_T),
            )
        else:
            self._in_parts(
                len(self.scores_TE),
                lambda low, high: best_k(self.scores_TE, rounded, self.k, low, high, self.chosen_TK, self.margin_T),
            )

    def excess(self, loads: Loads) -> int:
        """How many tokens are too many where they are."""
        load = np.bincount(self.chosen_TK.ravel(), minlength=self.scores_TE.shape[1])
        return int(np.maximum(load - loads.largest, 0).sum())

    def rounding(self, prices: NDArray[np.float64]) -> float:
        """A margin above this is certain in spite of the precision of the pass."""
        top = np.take_along_axis(self.scores_TE, self.chosen_TK, 1)
        largest = np.abs(top, where=np.isfinite(top), out=np.zeros_like(top)).max(initial=0.0)
        return 8 * float(np.finfo(self.scores_TE.dtype).eps) * (float(largest) + 2 * float(np.abs(prices).max()))

    def _in_parts(self, count: int, part: Callable[[int, int], None]) -> None:
        threads = torch.get_num_threads() if self.scores_TE.size >= PARALLEL else 1
        if threads == 1:
            part(0, count)
        else:
            edges = [count * i // threads for i in range(threads + 1)]
            list(_pool(os.getpid(), threads).map(part, edges[:-1], edges[1:]))


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Kept between calls; one per process, since threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="balanced-assignment")
