"""What ranks send each other: by hand, and in a real run against the plans that it recorded.

Shapes: W ranks, M messages, L layers.
"""

import csv
from pathlib import Path

import numpy as np
import program
import pytest
import torch

from lightning_base.callbacks.communication import Message, costs, summary
from lightning_base.report.document import build

EXPERTS, WIDTH, TOKENS, STEPS = 8, 32, 16 * 32, 3


def messages(*ranks: list[Message]) -> torch.Tensor:
    return torch.tensor([[list(message) for message in mine] for mine in ranks], dtype=torch.float64)


def test_two_groups_of_two_ranks_by_hand() -> None:
    # Layer 0 dispatches, layer 1 does something else. Ranks 0 and 1 are one group, 2 and 3 the other.
    ranks = [
        # layer, group, peers, begin, end, sent, received, largest, tokens
        [Message(0, 0, 1, 10.0, 10.5, 300, 100, 300, 1), Message(1, 0, 1, 11.0, 11.1, 40, 40, 40, 0)],
        [Message(0, 0, 1, 10.4, 10.5, 100, 300, 300, 1), Message(1, 0, 1, 11.0, 11.2, 40, 40, 40, 0)],
        [Message(0, 2, 1, 20.0, 20.2, 200, 200, 200, 1), Message(1, 2, 1, 21.3, 21.4, 40, 40, 40, 0)],
        [Message(0, 2, 1, 20.1, 20.2, 200, 200, 200, 1), Message(1, 2, 1, 21.0, 21.4, 40, 40, 40, 0)],
    ]
    found = costs(messages(*ranks), 2)
    assert found["bytes_sent"].tolist() == [[300, 40], [100, 40], [200, 40], [200, 40]]
    assert found["bytes_received"].tolist() == [[100, 40], [300, 40], [200, 40], [200, 40]]
    # Rank 0 is ready 0.4 s before rank 1, rank 2 0.1 s before rank 3, and rank 3 then 0.3 s before rank 2.
    expected = torch.tensor([[0.4, 0], [0, 0], [0.1, 0], [0, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(found["waiting"], expected)
    logged = {what: by_layer.tolist() for what, by_layer in summary(found).items()}
    assert logged["bytes"] == [200, 40]
    assert logged["busiest_rank"] == [1.5, 1]
    assert logged["largest_message"] == [300, 40]
    assert logged["seconds"] == pytest.approx([(0.5 + 0.1 + 0.2 + 0.1) / 4, (0.1 + 0.2 + 0.1 + 0.4) / 4])
    assert logged["waiting"] == pytest.approx([0.5 / 4, 0.3 / 4])
    assert logged["uneven_dispatch"] == [1.5, 0]


def test_a_message_is_compared_with_the_mean_one_to_a_peer() -> None:
    # Four ranks that send 60, 20, 20 and 20 bytes in all to three peers each: 10 to a peer on average, 40 at most.
    sent, largest = [60, 20, 20, 20], [40, 10, 10, 10]
    ranks = [[Message(0, 0, 3, 0.0, 1.0, n, 30, m, 1)] for n, m in zip(sent, largest, strict=True)]
    assert summary(costs(messages(*ranks), 1))["uneven_dispatch"].tolist() == [4.0]


@pytest.fixture(scope="module")
def runs(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """BASE and Switch on two ranks that share the experts, every plan kept."""
    folder = tmp_path_factory.mktemp("communication")
    ranks = ["strategy=expert_parallel", "trainer.devices=2", "trainer.record_plans=true"]
    steps = [f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1", f"trainer.validate_every_n_steps={STEPS}"]
    done = program.train("-m", *small_corpus, "router=base,switch", *ranks, *steps, f"runs_dir={folder}")
    assert done.returncode == 0, done.stderr
    jobs = program.jobs(folder).items()
    return {router: path for router in ("base", "switch") for name, path in jobs if f"router={router}," in name}


def rows_of(run: Path, step: int) -> dict[int, dict[str, float]]:
    """The only sparse layer's row of each rank."""
    with open(run / "communication.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) == step]
    return {int(row.pop("rank")): {k: float(v) for k, v in row.items() if k != "layer"} for row in rows}


def asked_of(run: Path, step: int, rank: int) -> np.ndarray:
    """How many tokens of a rank each expert computes, [E], from the recorded plans."""
    with np.load(run / "plans" / "train" / f"step_{step - 1:08d}.rank_{rank}_of_2.npz") as file:
        (name,) = [name for name in file.files if name.endswith("/expert_index")]
        return np.bincount(file[name], minlength=EXPERTS)


@pytest.mark.parametrize("router", ["base", "switch"])
def test_the_bytes_are_those_of_the_plans(router: str, runs: dict[str, Path]) -> None:
    for step in range(1, STEPS + 1):
        rows = rows_of(runs[router], step)
        # Rank 0 holds experts 0 to 3; what it asks of 4 to 7 leaves it, and what rank 1 asks of 0 to 3 arrives.
        out = int(asked_of(runs[router], step, 0)[4:].sum())
        into = int(asked_of(runs[router], step, 1)[:4].sum())
        # Forward, tokens go out and come back; backward, their gradients. BASE need not say how many they are.
        row, counts = 4 * WIDTH, {"base": 0, "switch": 8 * EXPERTS // 2}[router]
        for rank in range(2):
            assert rows[rank]["bytes_sent"] == rows[rank]["bytes_received"] == 2 * row * (out + into) + counts
            assert rows[rank]["largest_message"] == row * max(out, into)
            assert 0 <= rows[rank]["waiting"] <= rows[rank]["seconds"]
        if router == "base":
            assert out == into == TOKENS // 4


def test_what_is_logged_agrees_with_the_file(runs: dict[str, Path]) -> None:
    for router, run in runs.items():
        for what, column in (("bytes", "bytes_sent"), ("seconds", "seconds"), ("waiting", "waiting")):
            logged = program.series(run, f"communication/{what}/mean")
            assert [step for step, _ in logged] == list(range(1, STEPS + 1))
            for step, value in logged:
                assert value == pytest.approx(np.mean([row[column] for row in rows_of(run, step).values()]), abs=1e-5)
        uneven = [value for _, value in program.series(run, "communication/uneven_dispatch/max")]
        assert max(uneven) == 1 if router == "base" else max(uneven) > 1
        assert all(0 < share < 1 for _, share in program.series(run, "communication/share"))


def test_gradient_bytes_are_computed_from_sizes(runs: dict[str, Path]) -> None:
    for run in runs.values():
        manifest = program.read(run / "manifest.json")
        shared = manifest["ledger"]["parameters"] - 2 * EXPERTS * WIDTH * 64
        # Two copies in a ring: 2 (2 - 1) / 2 of their 4 bytes each. Experts have one copy.
        assert manifest["communication"] == {"gradient_bytes_computed": 4 * shared}


def test_the_report_has_a_table_of_it(runs: dict[str, Path]) -> None:
    (section,) = build(runs["base"].parent).sections
    (table,) = [table for table in section.tables if table.title == "What does sending tokens cost?"]
    cells = {row[0].rstrip("†‡§"): dict(zip(table.headings, row, strict=True)) for row in table.rows}
    # Two messages each way of a quarter of the tokens, in float32.
    assert cells["base"]["sent"] == f"{4 * TOKENS // 4 * WIDTH * 4 / 1000:.2f} k"
    assert cells["base"]["uneven dispatch"] == "1.000"
    assert float(cells["switch"]["uneven dispatch"]) > 1
    assert all(cell["share of the step"].endswith("%") for cell in cells.values())
