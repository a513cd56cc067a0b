"""The threads of the exact solver, made when first needed and kept."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache


@lru_cache(maxsize=4)
def thread_pool(threads: int) -> ThreadPoolExecutor:
    """So many threads, which the kernels use without the GIL. Work given to them must not wait for other such work."""
    return ThreadPoolExecutor(threads, thread_name_prefix="balanced-assignment")


os.register_at_fork(after_in_child=thread_pool.cache_clear)  # threads do not survive a fork: the child makes its own
