"""Ranks that tell each other something before there is a process group."""

import os
import socket

import forks
import pytest

from lightning_base.distributed.meeting import Meeting


def on_two_ranks(rank: int, port: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    # The first process keeps the store, and goes on keeping it when it has heard all.
    assert Meeting(timeout_seconds=120).hear("who", {"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    meeting = Meeting(timeout_seconds=120)
    assert meeting._store.get("who/1") == b'{"rank": 1}'
    assert meeting.hear("and now", rank or None) == [None, 1]
    if rank == 0:
        with pytest.raises(TimeoutError, match="rank 1 does not say what it finds in a file"):
            Meeting(timeout_seconds=1).hear("a file", "fine")
    assert meeting.hear("done", True) == [True, True]
    if rank == 0:
        meeting._store.get("gone")
    else:
        meeting._store.set("gone", "")
    os._exit(0)


def test_every_rank_hears_all_and_one_that_says_nothing_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    forks.call_on_two_ranks(on_two_ranks, port)


def test_a_process_alone_hears_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Meeting(timeout_seconds=1).hear("who", "me") == ["me"]
