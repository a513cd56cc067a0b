"""Where the time of a sparse layer goes."""

import time

import torch

# In the order in which a sparse layer passes through them.
PHASES = ("router", "dispatch", "experts", "combine")


class Stopwatch:
    """Adds up the seconds of each phase of the sparse layers that hold it.

    ``start`` and then ``lap(phase)`` at the end of each phase. While paused it takes nothing, so that whoever pauses it
    during the backward pass does not count the phases that activation checkpointing computes again. On a GPU each lap
    waits for the device, so that a phase is charged for its own kernels; hence only steps that are logged are measured.

    Args:
        device: where the layers are.

    Attributes:
        seconds: by phase, since the last ``reset``.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.paused = False
        self._began = 0.0

    # A compiler that traced these would freeze the time of compilation into its graph.
    @torch.compiler.disable
    def start(self) -> None:
        """The first phase begins."""
        if not self.paused:
            self._began = self.now()

    @torch.compiler.disable
    def lap(self, phase: str) -> None:
        """``phase`` ends, the next one begins."""
        if not self.paused:
            now = self.now()
            self.seconds[phase] += now - self._began
            self._began = now

    def now(self) -> float:
        """Seconds on a monotonic clock, once the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def reset(self) -> None:
        """Forgets what was measured and runs again."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.paused = False
