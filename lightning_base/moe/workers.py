"""Experts side by side on a CPU, each on a single thread.

A matrix product of a millisecond that is shared by all threads waits for the slowest of them; with as many experts as
there usually are, every thread has work of its own. An expert's result does not depend on the thread that computes it.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from threading import Barrier

import torch

# Floating-point operations from which a product is worth all threads, and below which all experts together are not
# worth waking any other thread.
LARGE, SMALL = 400_000_000, 20_000_000


def for_each_expert(task: Callable[[int, slice], None], sizes: Sequence[int], flops_per_row: int) -> None:
    """Calls ``task(expert, rows)`` once for each expert, with its rows of all that are sorted by expert.

    Args:
        task: writes to memory that no other expert's does; no gradient is recorded.
        sizes: rows of each expert.
        flops_per_row: what one product takes for each row.
    """
    begin = list(accumulate(sizes, initial=0))
    tasks = [(expert, slice(begin[expert], begin[expert + 1])) for expert in range(len(sizes))]
    threads = torch.get_num_threads()
    light = [expert for expert, size in enumerate(sizes) if 0 < size * flops_per_row < LARGE]
    if threads == 1 or len(light) == 1 or sum(sizes[expert] for expert in light) * flops_per_row < SMALL:
        light = []
    for expert in set(range(len(sizes))).difference(light):
        task(*tasks[expert])
    if light:
        # The longest are taken first, so that threads end at about the same time.
        left = [tasks[expert] for expert in sorted(light, key=sizes.__getitem__)]
        inference = torch.is_inference_mode_enabled()
        pool = _pool(os.getpid(), threads)
        for worker in [pool.submit(_drain, task, left, inference) for _ in range(threads)]:
            worker.result()


def _drain(task: Callable[[int, slice], None], left: list[tuple[int, slice]], inference: bool) -> None:
    # Neither mode is inherited from the thread that asked.
    with torch.inference_mode(inference), torch.no_grad():
        while left:
            try:
                expert, rows = left.pop()
            except IndexError:  # another thread was quicker
                return
            task(expert, rows)


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One for each process, since a fork has none of its parent's threads."""
    ready = Barrier(threads + 1)
    pool = ThreadPoolExecutor(threads, "expert", _become_single, (ready,))
    for _ in range(threads):
        pool.submit(int)  # a thread is started for every task while none is idle
    ready.wait()
    torch.set_num_threads(threads)  # what the next new thread starts from, which the threads of the pool have set to 1
    return pool


def _become_single(ready: Barrier) -> None:
    torch.get_num_threads()  # sets a new thread up, and would undo the next line if it came later
    torch.set_num_threads(1)
    ready.wait()
