"""What memory a pass takes on top of what was there before it."""

import ctypes
import gc
import resource
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_base.moe.memory import MEMORY

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # of proc(5)


def can_measure(device: str) -> bool:
    """On a GPU, and on a CPU where Linux tells."""
    return torch.device(device).type == "cuda" or CLEAR.exists()


def peak_bytes(method: Callable[[], object], device: str) -> int:
    """The most that one call holds at a time: activations, gradients and what lies between.

    On a CPU it is the growth of the process's resident memory at its peak, whoever allocates: torch, numpy or Numba.
    What our experts and the C library keep of earlier calls is given back first.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        method()
        return torch.cuda.max_memory_allocated(device) - before
    MEMORY.forget()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text(RESET_PEAK)
    before = status_bytes("VmRSS")
    method()
    return status_bytes("VmHWM") - before


def page_faults() -> int:
    """Pages that this process has touched for the first time so far; the kernel clears each."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def status_bytes(name: str) -> int:
    """A size in this process's status: ``VmRSS``, what is resident, or ``VmHWM``, its peak."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
