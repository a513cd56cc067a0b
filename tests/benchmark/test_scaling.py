"""Many ranks on paper, and few for real."""

import numpy as np
import pytest

from lightning_base.benchmark import scaling

# 600 parameters that all ranks hold, and 64 experts of 100, of which a token meets one.
LEDGER = {"router": "BASE", "parameters": 7000, "active_parameters": 700, "num_experts": 64, "top_k": 1}


def test_1024_ranks_on_paper_by_hand() -> None:
    manifest = {"ledger": LEDGER, "config": {"model": {"width": 8}}}
    busiest, largest, memory = scaling.paper_records(manifest, np.full((3, 64), 16), 1024)
    assert busiest["ratio"] == largest["ratio"] == 1
    # One expert on each of 64 ranks, and 16 copies of each.
    assert memory["ratio"] == round((600 + 100) / 7000, 4)
    assert memory["messages"] == 63
    # 16 tokens of 8 float32 to 63 others, there and back, and their gradients.
    assert memory["sent_megabytes"] == round(4 * 63 * 16 * 8 * 4 / 1e6, 3)


def test_what_a_fake_world_sends_is_held_against_what_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = {"ledger": LEDGER | {"router": "Switch"}, "config": {"model": {"width": 8}}}
    monkeypatch.setattr("lightning_base.benchmark.volumes.NUMBER", 2)
    with pytest.raises(RuntimeError, match=r"rank \d+ of 8: computed are"):
        list(scaling.paper_records(manifest, np.full((3, 64), 16), 8))


@pytest.mark.exhaustive
def test_real_runs_are_held_against_one_rank() -> None:
    found = {record["arm"]: record for record in scaling.measured(1, 10, ("base",))}
    kinds = [f"base, {name}, {n} rank{'s' * (n > 1)}" for name in scaling.STRATEGIES for n in scaling.RANKS]
    assert sorted(found) == sorted(kinds)
    assert all(record["tokens_per_second"] > 0 for record in found.values())
    assert {arm for arm, record in found.items() if record["exchange"]} == {
        "base, expert_parallel, 2 ranks",
        "base, expert_parallel, 4 ranks",
    }
