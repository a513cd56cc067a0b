"""metrics.csv: who may cut it when a run goes on."""

from pathlib import Path

import pytest
from lightning_fabric.utilities.rank_zero import rank_zero_only

from lightning_base.callbacks.metrics_csv import MetricsCsv

HEADER, OF_STEP_2, OF_STEP_3 = "step,seconds,name,value\r\n", "2,0.1,loss,1.0\r\n", "3,0.2,loss,0.9\r\n"


@pytest.mark.parametrize(("rank", "kept"), [("0", HEADER + OF_STEP_2), ("1", HEADER + OF_STEP_2 + OF_STEP_3)])
def test_the_first_rank_alone_cuts_the_rows_of_a_run_that_goes_on(
    rank: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A rank that was forked after Lightning had been imported: until there is a Trainer, each is the first.
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    monkeypatch.setenv("RANK", rank)
    path = tmp_path / "metrics.csv"
    path.write_bytes((HEADER + OF_STEP_2 + OF_STEP_3).encode())
    MetricsCsv(path, lambda: 0.3, resumed_step=2)
    assert path.read_bytes().decode() == kept
