"""The one place that decides how the compiled kernels are built: cached on disk, without the GIL or Numba's threads."""

import hashlib
import inspect
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.caching import FunctionCache
from numba.core.runtime import rtsys

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile `function` with Numba on first use and keep the machine code in Numba's on-disk cache.

    The GIL is released, so that chunks of one problem can run in a thread pool. Numba's own `parallel=True` is not
    used: its OpenMP layer aborts forked children (data-loader workers) and its default layer aborts on concurrent use.
    """
    return _compiled(function, fastmath=False)


def fast_kernel(function: F) -> F:
    """`kernel` for loops that take a minimum: the order of equal numbers and NaN do not matter, so they vectorise."""
    return _compiled(function, fastmath={"nnan", "nsz"})


def _compiled(function: F, fastmath: bool | set[str]) -> F:
    plain: Any = inspect.unwrap(function)  # a type-checking import hook may have wrapped it; Numba needs the source
    compiled: Any = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)(plain)
    try:
        compiled._cache = _PackageCache(plain)
    except RuntimeError:  # no writable place for a cache
        _announce("compiling the exact solver in this process only (NUMBA_CACHE_DIR can name a writable folder) ...")
    return compiled


class _PackageCache(FunctionCache):
    """Numba's cache of one function, made to notice changes in every file with kernels and to say when it compiles.

    Numba itself looks at the function's own file only, but the code of kernels in other files is built into it.
    """

    def _index_key(self, signature: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(signature, codegen), _source_digest())

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        # Numba would first refresh the context, which imports all that it can compile and scipy: two thirds of the time
        # of a first call. Machine code needs only the memory management; what compiles refreshes the context itself.
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            found = self._load_overload(signature, target_context)
        if found is None:
            _announce("compiling the exact solver, once per machine (about ten seconds) ...")
        return found


@cache
def _source_digest() -> str:
    sources = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"".join(source for source in sources if b"kernel\ndef " in source)).hexdigest()


@cache
def _announce(message: str) -> None:
    log.warning(message)
