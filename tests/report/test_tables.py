"""The numbers in the tables are those that were written into the run directories."""

import csv
import io
from pathlib import Path

import pytest
from hand_made_runs import edit, write_run, write_seeds

from lightning_base.report.document import Section, build
from lightning_base.report.formats import latex, render, table_csv
from lightning_base.report.tables import Table, numbers_table


def table_of(section: Section, start: str) -> Table:
    return next(table for table in section.tables if table.title.startswith(start))


def cells(table: Table, arm: str) -> dict[str, str]:
    """The first row of an arm by heading; a heading with a group has it in front."""
    row = next(row for row in table.rows if row[0].rstrip("†‡§¶") == arm)
    return {f"{column.group} {column.heading}".strip(): text for column, text in zip(table.columns, row, strict=True)}


def test_quality_and_cost_of_an_arm(experiment: Path) -> None:
    (section,) = build(experiment).sections
    row = table_of(section, "Quality, speed and cost").rows[1]
    # exp(4.5) = 90.017; 6.0 - 4.5 nats under the unigram entropy; 3 of 16 assignments dropped in every step.
    expected = ["switch", "4.5000", "1.500", "90.0", "2.2500", "300", "1.000 k", "4.000 k", "6.000 k"]
    assert row == [*expected, "4", "1", "1.25", "64", "12", "18.75 %"]


def test_the_short_table_of_one_seed(experiment: Path) -> None:
    (section,) = build(experiment).sections
    # Tokens per second 200, 400, 300 after the first window: quartiles 250 and 350.
    assert section.tables[0].rows == [
        ["base†", "5.0000", "–", "2.5000", "300 (250 to 350)", "0.00 %", "0.000", "1.000"],
        ["switch", "4.5000", "−0.5000", "2.2500", "300 (250 to 350)", "18.75 %", "0.538", "1.000"],
    ]
    assert any("Not causal in training" in note for note in section.notes)


def test_balance_in_training_and_in_evaluation(experiment: Path) -> None:
    (section,) = build(experiment).sections
    assert table_of(section, "Balance").rows == [
        ["base†", "training, one routing group", "0.000", "0.000", "0.000", "0.000", "–", "–"],
        ["base†", "training, one step", "0.000", "0.000", "0.000", "0.000", "–", "–"],
        ["base†", "evaluation, greedy", "1.000", "0.616", "1.000", "0.616", "0.00 %", "5.0000"],
        ["base†", "evaluation, balanced‡", "0.000", "0.000", "0.000", "0.000", "0.00 %", "4.7500"],
        ["switch", "training, one routing group", "1.000", "0.612", "0.538", "0.400", "–", "–"],
        ["switch", "training, one step", "1.000", "0.612", "0.538", "0.400", "–", "–"],
        ["switch", "evaluation", "1.000", "0.616", "1.000", "0.616", "0.00 %", "4.5000"],
    ]


def test_what_was_not_written_is_a_dash(tmp_path: Path) -> None:
    run = write_run(tmp_path / "only", "TopK", without=("train/tokens_per_second", "train_step/max_vio/load/mean"))
    edit(run / "manifest.json", "corpus>unigram_entropy", None)
    (section,) = build(tmp_path).sections
    row = cells(section.tables[0], "TopK")
    assert row["tokens/s"] == "–"
    full = table_of(section, "Quality, speed and cost")
    assert not {"under unigram", "tokens/s", "capacity factor"} & set(full.headings)
    assert table_of(section, "Balance").rows[1][2:6] == ["1.000", "0.612", "–", "0.612"]


def test_seeds_of_an_arm_become_mean_and_interval(tmp_path: Path) -> None:
    write_seeds(tmp_path, BASE=(5.0, 5.2, 5.4), Switch=(4.0, 4.6, 4.9))
    (section,) = build(tmp_path).sections
    base, switch = section.tables[0].rows
    # t(0.975, 2 degrees) = 4.3027: margins of 4.3027 x 0.2 / sqrt(3) and 4.3027 x sqrt(0.42 / 2) / sqrt(3).
    assert base[:6] == ["BASE†", "3", "5.2000 ± 0.4968", "–", "–", "0.2000"]
    assert switch[:6] == ["Switch", "3", "4.5000 ± 1.1384", "−0.7000 ± 0.6572", "0.044", "0.4583"]
    (row,) = table_of(section, "Paired differences").rows
    # The means of three of -1.0, -0.6, -0.5 drawn again: 1 in 27 is the lowest, 1 in 27 the highest.
    assert row[:6] == ["Switch", "BASE", "−0.7000 ± 0.6572", "−1.3572 to −0.0428", "−1.0000 to −0.5000", "0.0445"]
    assert row[6] == "3 of 3"


def test_the_speed_leaves_out_the_first_window(tmp_path: Path) -> None:
    write_run(tmp_path / "short", "TopK", changes={"trainer.max_steps": 2})
    (section,) = build(tmp_path).sections
    assert cells(section.tables[0], "TopK")["tokens/s"] == "200"


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


def test_loss_at_equal_steps_flops_and_time_and_the_time_to_a_loss(tmp_path: Path) -> None:
    # Curves: 8, 7, 6, 5 after 2, 4, 6, 8 s and 1, 2, 3, 4 times 96 kFLOPs; and 7.5, 6.5, 5.5, 4.5 with twice as many.
    write_run(tmp_path / "base", "BASE", 5.0)
    write_run(tmp_path / "dear", "TopK", 4.5, ledger={"flops_per_token": 12000.0})
    (section,) = build(tmp_path).sections
    table = table_of(section, "Quality at equal steps")
    assert "4 steps, 384.0 kFLOPs, 8.0 s of training. The loss that all runs reach: 5.0000." in table.lead
    # BASE's 384 kFLOPs are two steps of TopK; it is at 5.0 half way from 5.5 to 4.5, after 7 s.
    assert table.rows == [
        ["BASE†", "5.0000", "5.0000", "5.0000", "–", "–", "–", "8.00"],
        ["TopK", "4.5000", "6.5000", "4.5000", "−0.5000", "+1.5000", "−0.5000", "7.00"],
    ]
    short = section.tables[0].rows
    assert [row[0] for row in short] == ["BASE†", "TopK¶"]
    assert any(note.startswith("¶") for note in section.notes)


def test_a_loss_before_the_first_validation_is_not_made_up(tmp_path: Path) -> None:
    write_run(tmp_path / "base", "BASE", 5.0)
    write_run(tmp_path / "dear", "TopK", 1.5, ledger={"flops_per_token": 60000.0})
    (section,) = build(tmp_path).sections
    # 384 kFLOPs are less than half of the first step; 5.0 is above the first validation, 4.5.
    assert table_of(section, "Quality at equal steps").rows[1] == [
        "TopK", "1.5000", "–", "1.5000", "−3.5000", "–", "−3.5000", "–"
    ]  # fmt: skip


REFERENCE = "machine/reference_ms"


def test_an_arm_beside_a_busy_machine_is_flagged_and_its_speed_scaled(tmp_path: Path) -> None:
    times = {"a": [5.0, 5.0, 5.0, 5.0], "b": [6.0, 6.0, 6.0, 6.0], "c": [5.2, 5.2, 5.2, 5.2], "d": [5.0, 5.0, 7.0, 9.0]}
    routers = {"a": "BASE", "b": "Switch", "c": "TopK", "d": "Hash"}
    for name, values in times.items():
        write_run(tmp_path / name, routers[name], series={REFERENCE: values})
    (section,) = build(tmp_path).sections
    rows = {arm: cells(section.tables[0], arm) for arm in routers.values()}
    # 6.0 is 20 % slower than 5.0, 5.2 is 4 %. Hash: median 6.0, quartiles 5.0 and 7.5.
    speeds = [(row["tokens/s"][-1], row["scaled tokens/s"]) for row in rows.values()]
    assert speeds == [(")", ""), ("§", "360"), (")", ""), ("§", "360")]
    (caution,) = section.cautions
    assert "Switch (1.20 times as long, quartiles 0 % of it apart)" in caution
    assert "Hash (1.20 times as long, quartiles 42 % of it apart)" in caution
    assert "TopK" not in caution
    assert any(note.startswith("§") for note in section.notes)


def test_an_uneven_machine_is_flagged_though_its_median_is_low(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "BASE", series={REFERENCE: [5.0, 5.0, 5.0, 5.0]})
    write_run(tmp_path / "b", "Switch", series={REFERENCE: [5.0, 5.0, 5.0, 9.0]})
    (section,) = build(tmp_path).sections
    # Quartiles 5.0 and 6.0.
    assert "Switch (1.00 times as long, quartiles 20 % of it apart)" in section.cautions[0]


def test_runs_that_timed_nothing_are_not_said_to_be_noisy(experiment: Path) -> None:
    (section,) = build(experiment).sections
    assert section.cautions == []
    assert not any("§" in cell for row in section.tables[0].rows for cell in row)


def test_csv_has_the_cells_and_numbers_are_unrounded(tmp_path: Path) -> None:
    write_seeds(tmp_path, BASE=(5.0, 5.2, 5.4), Switch=(4.0, 4.6, 4.912345678))
    (section,) = build(tmp_path).sections
    rows = list(csv.reader(io.StringIO(table_csv(section.tables[0]))))
    assert rows == [section.tables[0].headings, *section.tables[0].rows]
    numbers = list(csv.DictReader(io.StringIO(table_csv(numbers_table(section.comparison.arms)))))
    losses = [row for row in numbers if row["measure"] == "validation loss"]
    assert [(row["arm"], row["seed"], float(row["value"])) for row in losses][3:] == [
        ("Switch", "1", 4.0),
        ("Switch", "2", 4.6),
        ("Switch", "3", 4.912345678),
    ]


def test_latex_is_escaped_and_has_a_cell_for_every_column(tmp_path: Path) -> None:
    assert latex("50 % of top_k & #1 {x}~\\") == r"50 \% of top\_k \& \#1 \{x\}\textasciitilde{}\textbackslash{}"
    write_seeds(tmp_path, BASE=(5.0, 5.2, 5.4), Switch=(4.0, 4.6, 4.9))
    (section,) = build(tmp_path).sections
    for table in section.tables:
        lines = render("table.tex", table=table).splitlines()
        sides = lines[1].removeprefix(r"\begin{tabular}{").removesuffix("}")
        body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
        assert [line.replace(r"\&", "").count(" & ") + 1 for line in body] == [len(sides)] * len(table.rows)
    assert r"\textbf{$-$0.7000 $\pm$ 0.6572}" in render("table.tex", table=section.tables[0])
    assert r"BASE\dag{}" in render("table.tex", table=section.tables[0])
