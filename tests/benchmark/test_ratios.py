"""Ratios, their spread, and what a check makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_base.benchmark import ledger, timing
from lightning_base.benchmark.check import missing, regressions
from lightning_base.benchmark.command import parser
from lightning_base.benchmark.page import write
from lightning_base.benchmark.record import Record, ratio_record, reached
from lightning_base.benchmark.table import whole


def record(ratios: list[float], **options: Any) -> Record:
    return ratio_record("layer", "8 x 4 x 2", "BASE", "forward / floor", np.array(ratios), **options)


def test_a_record_has_the_median_and_the_quartiles_of_its_rounds() -> None:
    found = record([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found["ratio"], found["low"], found["high"], found["rounds"]) == (3.0, 2.0, 4.0, 5)


def test_every_method_runs_once_a_round_after_one_call_that_is_not_timed() -> None:
    calls: list[str] = []
    times = timing.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4, seconds=60.0)
    assert sorted(calls) == sorted("abc" * 5)
    assert all(len(taken) == 4 for taken in times.values())
    assert all(sorted(calls[i : i + 3]) == ["a", "b", "c"] for i in range(0, 15, 3))


def test_rounds_end_with_the_time_but_not_before_three() -> None:
    times = timing.interleaved({"a": lambda: None}, rounds=50, seconds=0.0)
    assert len(times["a"]) == 3


def test_a_part_is_charged_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # The outer part runs from 0 to 10, the inner one in it from 3 to 7.
    clock = iter([0.0, 3.0, 7.0, 10.0])
    monkeypatch.setattr(ledger.time, "perf_counter", lambda: next(clock))
    book = ledger.Ledger()
    inner = book.charge("inner", lambda: None)
    book.charge("outer", lambda: inner())()
    book.close_turn()
    assert book.turns == [{"outer": 6.0, "inner": 4.0}]


def test_what_is_slow_in_the_first_round_sits_most_rounds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing, "now", lambda _device: clock[0])

    def takes(seconds: float) -> timing.Method:
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    methods = {"a": takes(1.0), "b": takes(1.0), "c": takes(1.0), "slow": takes(4.0)}
    times = timing.interleaved(methods, rounds=5, seconds=60.0, slow_every=3)
    np.testing.assert_array_equal(times["slow"], [4.0, np.nan, np.nan, 4.0, np.nan])
    assert times["a"].tolist() == [1.0] * 5
    found = record(list(times["slow"] / times["a"]))
    assert (found["ratio"], found["rounds"]) == (4.0, 2)


@pytest.mark.parametrize(
    ("better", "now", "found"),
    [("lower", 1.5, True), ("lower", 1.1, False), ("lower", 0.5, False), ("higher", 0.6, True), ("higher", 2.0, False)],
)
def test_a_check_names_what_got_worse_by_more_than_noise(better: str, now: float, found: bool) -> None:
    before, after = record([1.0] * 3, better=better), record([now] * 3, better=better)
    worse = regressions([after], [before])
    assert [change.now for change in worse] == ([after] if found else [])
    assert all("BASE" in str(change) and f"{now:g}" in str(change) for change in worse)


def test_a_check_allows_for_the_spread_that_was_measured() -> None:
    # Quartiles 0.9 and 1.1 about 1: a difference of three half widths, 0.3, is noise.
    wide = record([0.8, 0.9, 1.0, 1.1, 1.2])
    assert not regressions([record([1.29] * 3)], [wide])
    assert regressions([record([1.31] * 3)], [wide])


def test_the_shortest_check_names_only_what_is_grossly_worse() -> None:
    before = record([1.0] * 3)
    assert not regressions([record([1.9] * 3)], [before], gross=True)
    assert regressions([record([2.1] * 3)], [before], gross=True)


def test_small_shares_of_a_step_are_no_alarm() -> None:
    assert not regressions([record([0.009] * 3)], [record([0.0001] * 3)])


def test_a_measurement_that_is_gone_is_named() -> None:
    before = record([1.0] * 3)
    assert missing([], [before], ["layer"]) == ["layer, 8 x 4 x 2, BASE, forward / floor"]
    assert missing([], [before], ["step"]) == []


def test_an_aim_in_seconds_is_held_against_the_seconds() -> None:
    slow = record([0.5] * 3, absolute=(7.0, "s", 6.0))
    assert reached(slow) is False
    assert reached(record([0.5] * 3, absolute=(5.0, "s", 6.0))) is True
    assert "7 s (≤ 6: missed by 17%)" in whole([slow])


def test_a_page_is_filled_from_the_records(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("before\n<!-- begin aims --> old <!-- end aims -->\nafter\n")
    machine = {"cpu": "C", "cores": 2, "threads": 2, "gpu": None, "torch": "2", "python": "3", "load_average": [0.0]}
    machine["load_average_after"] = [0.5]
    records = [record([1.2] * 3, aim=1.0)]
    write(page, {"machine": machine, "form": "quick", "records": records})
    text = page.read_text()
    assert text.startswith("before\n<!-- begin aims -->")
    assert text.endswith("<!-- end aims -->\nafter\n")
    assert "old" not in text
    assert "1.20 (≤ 1: missed by 20%)" in text
    assert (tmp_path / "images" / "performance.png").stat().st_size > 1000
    page.write_text("<!-- begin long -->a<!-- end long --> <!-- begin compiled -->b<!-- end compiled -->")
    write(page, {"machine": machine, "form": "quick", "records": records})
    assert page.read_text() == "<!-- begin long -->a<!-- end long --> <!-- begin compiled -->b<!-- end compiled -->"
    long = {**records[0], "setting": "2048 x 128 x 4"}
    step = ratio_record("step", "s", "base, compiled", "step / dense", np.array([0.9]))
    others = [{"machine": machine, "form": "full", "records": found} for found in ([*records, long], [step])]
    write(page, {"machine": machine, "form": "quick", "records": records}, others)
    text = page.read_text()
    assert "2048 x 128 x 4:" in text
    assert "8 x 4 x 2" not in text  # the main run has it
    assert "Not measured: 2048 x 128 x 8, " in text
    assert "2048 x 2048 x 8." in text
    assert "| base, compiled | 0.90 |" in text
    page.write_text("<!-- begin nothing --> <!-- end nothing -->")
    with pytest.raises(ValueError, match="asks for nothing, which was not measured"):
        write(page, {"machine": machine, "form": "quick", "records": records})


@pytest.mark.parametrize("text", ["2048x128", "2048x128x7", "100x128x4", "0x128x1", "axbxc"])
def test_a_size_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parser().parse_args(["layer", "--sizes", "2048x128x8", "4096x64x4"]).sizes == [(2048, 128, 8), (4096, 64, 4)]
    with pytest.raises(SystemExit):
        parser().parse_args(["layer", "--sizes", text])
    assert "invalid size" in capsys.readouterr().err
