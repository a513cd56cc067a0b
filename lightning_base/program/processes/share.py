"""The share of a machine that a job gets when a launcher runs several side by side: cores, and GPUs of its own."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout


class Share:
    """A process that runs jobs takes a free slot and keeps it until it ends; what it starts inherits cores and GPUs."""

    held: FileLock | None = None

    @classmethod
    def take(cls, folder: Path, slots: int, gpus: int) -> None:
        """Takes a slot, unless this process has one.

        Args:
            folder: for the locks that say which slots are taken.
            slots: how many there are.
            gpus: for each; 0 leaves them alone.
        """
        if cls.held is not None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for slot in range(slots):
            lock = FileLock(folder / f"{slot}.lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            cls.held = lock
            if sys.platform == "linux":
                os.sched_setaffinity(0, cores_of(slot, slots, sorted(os.sched_getaffinity(0))))
            if gpus:
                os.environ["CUDA_VISIBLE_DEVICES"] = gpus_of(slot, gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
            return


def cores_of(slot: int, slots: int, cores: Sequence[int]) -> list[int]:
    """An even share of the cores, at least one.

    >>> [cores_of(slot, 2, [0, 1, 2, 3, 4]) for slot in range(2)], cores_of(2, 3, [0, 1])
    ([[0, 1], [2, 3, 4]], [0])
    """
    own = cores[slot * len(cores) // slots : (slot + 1) * len(cores) // slots] if slots <= len(cores) else []
    return list(own) or [cores[slot % len(cores)]]


def gpus_of(slot: int, gpus: int, visible: str | None) -> str:
    """What CUDA_VISIBLE_DEVICES is for a slot, given what it was.

    >>> gpus_of(1, 2, None), gpus_of(1, 1, "4,7")
    ('2,3', '7')
    """
    named = visible.split(",") if visible else [str(each) for each in range((slot + 1) * gpus)]
    return ",".join(named[slot * gpus : (slot + 1) * gpus])
