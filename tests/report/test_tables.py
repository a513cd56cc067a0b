"""The numbers in the tables are those that were written into the run directories."""

from pathlib import Path

import pytest
from hand_made_runs import edit, write_run

from lightning_base.report.document import build
from lightning_base.report.table import Table


def cells(table: Table, arm: str) -> dict[str, str]:
    """The first row of an arm by heading; a repeated heading has its group in front."""
    row = next(row for row in table.rows if row[0].rstrip("†‡") == arm)
    return {f"{column.group} {column.heading}".strip(): text for column, text in zip(table.columns, row, strict=True)}


def test_quality_and_cost_of_an_arm(experiment: Path) -> None:
    (section,) = build(experiment).sections
    row = section.tables[1].rows[1]
    # exp(4.5) = 90.017; 6.0 - 4.5 nats under the unigram entropy; 3 of 16 assignments dropped in every step.
    expected = ["switch", "4.5000", "1.500", "90.0", "2.2500", "300", "1.000 k", "4.000 k", "6.000 k"]
    assert row == [*expected, "4", "1", "1.25", "64", "12", "18.75 %"]


def test_balance_in_training_and_in_evaluation(experiment: Path) -> None:
    (section,) = build(experiment).sections
    assert section.tables[2].rows == [
        ["base†", "training, one routing group", "0.000", "0.000", "0.000", "0.000", "–", "–"],
        ["base†", "training, one step", "0.000", "0.000", "0.000", "0.000", "–", "–"],
        ["base†", "evaluation, greedy", "1.000", "0.616", "1.000", "0.616", "0.00 %", "5.0000"],
        ["base†", "evaluation, balanced‡", "0.000", "0.000", "0.000", "0.000", "0.00 %", "4.7500"],
        ["switch", "training, one routing group", "1.000", "0.612", "0.538", "0.400", "–", "–"],
        ["switch", "training, one step", "1.000", "0.612", "0.538", "0.400", "–", "–"],
        ["switch", "evaluation", "1.000", "0.616", "1.000", "0.616", "0.00 %", "4.5000"],
    ]


def test_the_lowest_loss_is_marked_and_so_is_routing_that_sees_later_tokens(experiment: Path) -> None:
    (section,) = build(experiment).sections
    assert section.tables[0].strong == {(1, 1)}
    assert [row[0] for row in section.tables[0].rows] == ["base†", "switch"]
    assert any("Not causal in training" in note for note in section.tables[0].notes)


def test_what_was_not_written_is_a_dash(tmp_path: Path) -> None:
    run = write_run(tmp_path / "only", "TopK", without=("train/tokens_per_second", "train_step/max_vio/load/mean"))
    edit(run / "manifest.json", "corpus>unigram_entropy", None)
    (section,) = build(tmp_path).sections
    row = cells(section.tables[1], "TopK")
    assert row["Speed tokens/s"] == "–"
    assert row["Quality on held-out text under unigram"] == "–"
    assert row["Routing in training capacity factor"] == "–"
    assert section.tables[2].rows[1][2:6] == ["1.000", "0.612", "–", "0.612"]


def test_seeds_of_an_arm_become_mean_and_standard_deviation(tmp_path: Path) -> None:
    for seed, (base, switch) in enumerate([(5.0, 4.0), (5.2, 4.6), (5.4, 4.9)], start=1):
        write_run(tmp_path / f"base{seed}", "BASE", base, seed=seed)
        write_run(tmp_path / f"switch{seed}", "Switch", switch, seed=seed)
    (section,) = build(tmp_path).sections
    base, switch = section.tables[0].rows
    assert base[:3] == ["BASE†", "3", "5.2000 ± 0.2000"]
    # Mean 4.5; deviations -0.5, 0.1, 0.4; sqrt(0.42 / 2) = 0.4583.
    assert switch[:3] == ["Switch", "3", "4.5000 ± 0.4583"]
    # BASE minus Switch, seed by seed: 1.0, 0.6, 0.5; mean 0.7, standard deviation sqrt(0.14 / 2) = 0.2646.
    assert "Switch is 0.7000 ± 0.2646 below BASE" in section.summary[-1]
    assert "in 3 of 3" in section.summary[-1]


def test_the_speed_leaves_out_the_first_window(tmp_path: Path) -> None:
    write_run(tmp_path / "short", "TopK", changes={"trainer.max_steps": 2})
    (section,) = build(tmp_path).sections
    assert cells(section.tables[1], "TopK")["Speed tokens/s"] == "200"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (
            ("router.capacity_factor=1.0", "router.capacity_factor=2.0"),
            ["Switch, capacity_factor=1.0", "Switch, capacity_factor=2.0"],
        ),
        (("switch, seed=1", "switch, seed=1"), ["switch (capacity_factor=1.0)", "switch (capacity_factor=2.0)"]),
    ],
)
def test_arms_of_one_router_are_told_apart_by_their_options(
    tmp_path: Path, labels: tuple[str, str], expected: list[str]
) -> None:
    for name, factor in (("a", 1.0), ("b", 2.0)):
        write_run(tmp_path / name, "Switch", changes={"router.capacity_factor": factor})
    (tmp_path / "sweep.json").write_text(f'{{"jobs": {{"a": "{labels[0]}", "b": "{labels[1]}"}}}}')
    (section,) = build(tmp_path).sections
    assert section.labels == expected
