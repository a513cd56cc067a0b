"""Rows sent between two processes joined by gloo, and back."""

from pathlib import Path

import forks
import pytest
import torch
from tiny_training import leave

from lightning_base.moe.exchange import Exchange

WIDTH = 4
# How many rows each rank sends to rank 0 and rank 1.
SENDS = {"uneven": [[3, 1], [0, 2]], "rank 1 has none": [[1, 2], [0, 0]], "nobody has any": [[0, 0], [0, 0]]}


class Record:
    """A meter that keeps what it is told."""

    def __init__(self) -> None:
        self.begun, self.messages = 0, []

    def begin(self) -> None:
        self.begun += 1

    def end(self, kind: str, sent: list[int], received: list[int]) -> None:
        self.messages.append((kind, sent, received))


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, sends in SENDS.items():
        for dtype in (torch.float64, torch.bfloat16):
            exchange = Exchange(torch.distributed.group.WORLD)
            exchange.meter = Record()
            send = sends[rank]
            receive = exchange.counts(torch.tensor(send)[:, None]).flatten().tolist()
            rows = torch.tensor([[10 * rank + i] * WIDTH for i in range(sum(send))]).view(-1, WIDTH).to(dtype)
            rows.requires_grad_()
            arrived = exchange.rows(rows, send, receive)
            (arrived**2).sum().backward()
            record = (exchange.meter.begun, exchange.meter.messages)
            found[f"{name}, {dtype}"] = (receive, arrived.detach(), rows.detach(), rows.grad, record)
    torch.save(found, Path(folder, f"{rank}.pt"))
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("exchange")
    forks.call_on_two_ranks(on_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("dtype", ["torch.float64", "torch.bfloat16"])
def test_rows_arrive_in_the_order_of_the_ranks(ranks: list[dict], dtype: str) -> None:
    # Rank 0 holds rows 0 to 3 and keeps the first three; rank 1 holds rows 10 and 11 and keeps them.
    expected = {"uneven": [[0, 1, 2], [3, 10, 11]], "rank 1 has none": [[0], [1, 2]], "nobody has any": [[], []]}
    for name, by_rank in expected.items():
        for rank in range(2):
            receive, arrived, *_ = ranks[rank][f"{name}, {dtype}"]
            assert arrived[:, 0].tolist() == by_rank[rank]
            assert arrived.shape == (sum(receive), WIDTH)
            assert receive == [SENDS[name][sender][rank] for sender in range(2)]


@pytest.mark.parametrize("dtype", ["torch.float64", "torch.bfloat16"])
def test_gradients_come_back_to_the_row_they_belong_to(ranks: list[dict], dtype: str) -> None:
    for name in SENDS:
        for rank in range(2):
            _, _, rows, gradient, _ = ranks[rank][f"{name}, {dtype}"]
            assert torch.equal(gradient, 2 * rows)  # d x^2 = 2x, wherever it was squared


def test_every_message_is_metered(ranks: list[dict]) -> None:
    begun, messages = ranks[0]["uneven, torch.float64"][4]
    row = WIDTH * 8
    assert begun == 3
    assert messages == [
        ("counts", [8, 8], [8, 8]),
        ("rows", [3 * row, row], [3 * row, 0]),
        ("rows_backward", [3 * row, 0], [3 * row, row]),
    ]
