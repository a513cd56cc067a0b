"""What ranks tell each other before there is a process group."""

import json
import os
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Meeting:
    """By way of the store that torchrun, or the first rank, keeps for all; a process alone talks to itself.

    Args:
        timeout_seconds: how long ranks wait for each other.
    """

    def __init__(self, timeout_seconds: int) -> None:
        self._store: dist.Store | None = None
        self.rank, self.size = 0, int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            self._store, self.rank = common_store(timeout_seconds)

    def hear(self, question: str, answer: T) -> list[T]:
        """The answer of every rank, which JSON can hold, in their order; every rank has to ask, and once.

        Raises:
            TimeoutError: a rank does not answer.
        """
        if self._store is None:
            return [answer]
        self._store.set(f"{question}/{self.rank}", json.dumps(answer))
        return [json.loads(self._of(rank, question)) for rank in range(self.size)]

    def _of(self, rank: int, question: str) -> bytes:
        assert self._store is not None
        try:
            found: bytes = self._store.get(f"{question}/{rank}")
        except dist.DistStoreError as error:
            raise TimeoutError(f"rank {rank} does not say what it finds in {question}: {error}") from error
        return found


@cache  # the first rank may be the one that keeps it, and others read what they are told when it has heard all
def common_store(timeout_seconds: int) -> tuple[dist.Store, int]:
    """The store of all ranks, for as long as this process lives, and this process's rank."""
    store, rank, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_seconds))))
    return store, rank
