"""The one place that decides how the compiled kernels are built: cached on disk, without the GIL or Numba's threads."""

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile `function` with Numba on first use and keep the machine code in Numba's on-disk cache.

    The GIL is released, so that chunks of one problem can run in a thread pool. Numba's own `parallel=True` is not
    used: its OpenMP layer aborts forked children (data-loader workers) and its default layer aborts on concurrent use.
    Kernels that call each other live in one file, because the cache notices changes in a kernel's own file only.
    """
    plain: Any = inspect.unwrap(function)  # a type-checking import hook may have wrapped it; Numba needs the source
    try:
        compiled: Any = numba.njit(cache=True, nogil=True, error_model="numpy")(plain)
    except RuntimeError:  # no writable place for a cache: compile once per process instead
        compiled = numba.njit(nogil=True, error_model="numpy")(plain)
    return compiled


def announce_compilation(function: Any) -> None:
    """Log one line if `function` has no machine code on this machine yet, because building it takes seconds."""
    cache = getattr(function, "_cache", None)
    folder = getattr(cache, "cache_path", None)
    name = f"{Path(function.py_func.__code__.co_filename).stem}.{function.py_func.__qualname__}"
    if folder is None or not any(Path(folder).glob(f"{name}-*.nbc")):
        log.warning("compiling the exact solver, once per machine (about ten seconds) ...")
