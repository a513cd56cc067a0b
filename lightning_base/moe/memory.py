"""Large arrays on a CPU whose memory is used again.

What a layer frees after a step, the C library gives back to the kernel, which clears it page by page when the next step
asks for it. A virtual machine may have returned it to its host meanwhile, and has to ask there too: a backward pass
in four took longer, the slowest up to six times as long as most.
"""

import math
import os
import threading
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

PRECISIONS: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
SMALL = 2**20  # bytes, below which the C library keeps what is freed
SLACK = 1.25  # how many times as large as what is asked for a block may be
STEPS = 8  # sizes of blocks between two powers of two, so that those of nearly equal steps fit each other


class KeptMemory:
    """Blocks of memory that go round.

    Together they never hold more bytes than were once in use at the same time. numpy asks the kernel for huge pages,
    torch only where an environment variable says so.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # collecting garbage while a block is looked for can bring another one back
        self._free: list[np.ndarray] = []  # in the order in which they came back
        self._used = self._most = 0

    @property
    def used(self) -> int:
        """Bytes of the blocks that tensors lie in."""
        return self._used

    @property
    def free(self) -> int:
        """Bytes of the blocks that wait."""
        return sum(block.nbytes for block in self._free)

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """A tensor whose values are not set; its block comes back when nothing refers to it any more.

        Args:
            dtype: float32 or float64.
            shape: of the tensor.
        """
        size = math.prod(shape) * PRECISIONS[dtype].itemsize
        if size < SMALL:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            block = self._take(size)
            self._used += block.nbytes
            self._most = max(self._most, self._used)
        array = block[:size].view(PRECISIONS[dtype]).reshape(shape)
        weakref.finalize(array, self._come_back, block).atexit = False
        return torch.from_numpy(array)

    def forget(self) -> None:
        """Frees the blocks that wait."""
        with self._lock:
            self._free.clear()

    def renew_lock(self) -> None:
        """For a process that was forked while another thread held it."""
        self._lock = threading.RLock()

    def _take(self, size: int) -> np.ndarray:
        fitting = [place for place, block in enumerate(self._free) if size <= block.nbytes <= SLACK * size]
        if fitting:
            return self._free.pop(min(fitting, key=lambda place: self._free[place].nbytes))
        step = 2 ** (size.bit_length() - 1) // STEPS
        size = -(-size // step) * step
        while self._free and self._used + self.free + size > self._most:
            del self._free[0]
        return np.empty(size, np.uint8)

    def _come_back(self, block: np.ndarray) -> None:
        with self._lock:
            self._used -= block.nbytes
            self._free.append(block)


MEMORY = KeptMemory()
os.register_at_fork(after_in_child=MEMORY.renew_lock)
