"""The tables of single questions show what was written, and only where something was."""

import csv
import json
from pathlib import Path

import pytest
from hand_made_runs import edit, write_run

from lightning_base.report.document import build
from lightning_base.report.tables import Table
from lightning_base.report.write import write_report

STEPS = 4


def add_metrics(run: Path, rows: list[tuple[int, str, float]]) -> None:
    """More scalars, which the manifest repeats where they are results of the final passes."""
    with open(run / "metrics.csv", "a", newline="") as file:
        csv.writer(file).writerows((step, 2.0 * step, name, value) for step, name, value in rows)
    result = json.loads((run / "manifest.json").read_text())["result"]
    edit(run / "manifest.json", "result", result | {name: value for _, name, value in rows if name.startswith("final")})


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    base, switch = write_run(tmp_path / "base", "BASE"), write_run(tmp_path / "switch", "Switch", 4.5)
    phases = ("router", "assignment", "dispatch", "experts", "combine", "other_forward", "waiting")
    for run, assignment in ((base, 0.3), (switch, 0.0)):
        rows = []
        for step in range(1, STEPS + 1):
            # The first logged step takes ten times as long and must not count.
            times = dict.fromkeys(phases, 0.05) | {"assignment": assignment}
            times["backward_and_optimizer"] = 1 - sum(times.values())
            for phase, share in times.items():
                rows.append((step, f"train_time/share_{phase}", 0.125 if step == 1 else share))
                rows.append((step, f"train_time/{phase}", 10.0 if step == 1 else share * 0.2))
            rows.append((step, "train_step/idle_fraction_experts/mean", 0.0 if run is base else 0.4))
        for way, training in (("expert", 0.25), ("weight", 0.125), ("drop", 0.0), ("any", 0.375)):
            rows.append((STEPS, f"final_causality/leak_training_{way}/max", training if run is base else 0.0))
            rows.append((STEPS, f"final_causality/leak_evaluation_{way}/max", 0.0))
        if run is base:
            rows.append((STEPS, "final_balanced_pass/routing_gap/mean", 0.1875))
        add_metrics(run, rows)
    return tmp_path


def tables(experiment: Path) -> dict[str, Table]:
    (section,) = build(experiment).sections
    return {table.title: table for table in section.tables}


def cells(table: Table, row: int) -> dict[str, str]:
    return {
        f"{column.group} {column.heading}".strip(): text
        for column, text in zip(table.columns, table.rows[row], strict=True)
    }


def test_the_short_table_comes_first_and_the_others_fold(experiment: Path) -> None:
    (section,) = build(experiment).sections
    assert [table.title for table in section.tables] == [
        "The arms",
        "Quality at equal steps, FLOPs and time; learning curves",
        "Quality, speed and cost; loss against speed",
        "Balance: demand and load of each expert",
        "Who would wait, and what would be padding?",
        "What does balanced routing change?",
        "Does routing look ahead?",
        "Where does the time of a step go?",
    ]
    assert len(section.tables[0].columns) <= 10
    # All but the short table: those, what the arms share, each run, and in it a run each.
    assert write_report(experiment, quiet=True).read_text().count("<details>") == 7 + 2 + 2


def test_a_heading_is_explained_once_where_it_first_stands(experiment: Path) -> None:
    explained = [name for table in tables(experiment).values() for name, _ in table.help]
    assert len(explained) == len(set(explained))
    shown = {column.heading for table in tables(experiment).values() for column in table.columns}
    assert shown - set(explained) == {"arm"}
    assert "max_vio" in dict(tables(experiment)["The arms"].help)
    assert "a leak" in tables(experiment)["Does routing look ahead?"].lead.lower()


def test_the_leak_of_each_way_of_routing(experiment: Path) -> None:
    table = tables(experiment)["Does routing look ahead?"]
    base = cells(table, 0)
    assert base["arm"] == "BASE†"
    assert base["routed as in training chosen"] == "25.00 %"
    assert base["routed as in training gates"] == "12.50 %"
    assert base["routed as in training any"] == "37.50 %"
    assert cells(table, 1)["routed as in training any"] == "0.00 %"


def test_every_table_marks_what_is_declared_and_the_page_says_so_once(experiment: Path) -> None:
    modes = {"expert_choice": False, "greedy": True}
    declared = {"causal_in_training": False, "evaluation_modes": modes, "straight_through": True}
    third = write_run(experiment / "third", "ExpertChoice", 4.0, ledger=declared)
    rows = [
        (STEPS, "final_causality/leak_evaluation_any/max", 0.5),
        (STEPS, "train_step/idle_fraction_experts/mean", 0),
    ]
    rows += [(step, "train_time/share_router", 1.0) for step in range(1, STEPS + 1)]
    rows += [(STEPS, "final_greedy_pass/routing_gap/mean", 0.5)]
    add_metrics(third, rows)
    alarm = {"name": "collapse", "layer": "layer_1", "step": 3, "value": 4.0, "sentence": "all to one"}
    for run in ("base", "switch", "third"):
        edit(experiment / run / "status.json", "alarms", [alarm])
    found = tables(experiment)
    assert len(found) == 9
    balance, gap = found.pop("Balance: demand and load of each expert"), found.pop("What does balanced routing change?")
    for title, table in found.items():
        # As each is usually evaluated.
        assert sorted(row[0] for row in table.rows) == ["BASE†", "ExpertChoice†‡‖", "Switch"], title
    # With a row for each way of routing, the mark is where it belongs.
    ways = {(row[0], row[1]) for row in balance.rows if row[1].startswith("evaluation")}
    assert ways == {
        ("BASE†", "evaluation, greedy"),
        ("BASE†", "evaluation, balanced‡"),
        ("ExpertChoice†‖", "evaluation, expert_choice‡"),
        ("ExpertChoice†‖", "evaluation, greedy"),
        ("Switch", "evaluation"),
    }
    assert [row[1] for row in gap.rows] == ["greedy", "balanced‡", "expert_choice‡", "greedy"]
    page = write_report(experiment, quiet=True)
    for text in (page.read_text(), page.with_suffix(".md").read_text()):
        assert text.count("† Not causal in training") == text.count("‡ Not causal in evaluation") == 1
        assert text.count("‖ Learns through a straight-through gate") == 1


def test_the_page_the_file_and_the_terminal_explain_the_marks(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = write_report(experiment)
    for text in (page.read_text(), page.with_suffix(".md").read_text(), capsys.readouterr().out):
        assert "BASE†" in text
        assert "† Not causal in training" in text


def test_what_balanced_routing_changes(experiment: Path) -> None:
    table = tables(experiment)["What does balanced routing change?"]
    # [20, 10, 6, 4] has mean 10 and max_vio 1; Switch has one way of routing and no row.
    assert table.rows == [
        ["BASE†", "greedy", "–", "5.0000", "1.000"],
        ["BASE†", "balanced‡", "18.75 %", "4.7500", "0.000"],
    ]


def test_the_parts_of_a_step_leave_out_the_first(experiment: Path) -> None:
    table = tables(experiment)["Where does the time of a step go?"]
    assert cells(table, 0)["share of a training step assignment"] == "30.00 %"
    assert cells(table, 1)["share of a training step assignment"] == "0.00 %"
    assert cells(table, 1)["share of a training step backward and optimizer"] == "70.00 %"


def test_alarms_are_listed_with_their_sentence(experiment: Path) -> None:
    assert "What raised an alarm?" not in tables(experiment)
    alarm = {
        "name": "collapse",
        "layer": "layer_1",
        "step": 3,
        "value": 4.0,
        "sentence": "expert 0 gets 4.0 times its share",
    }
    edit(experiment / "switch" / "status.json", "alarms", [alarm])
    rows = tables(experiment)["What raised an alarm?"].rows
    assert rows == [["Switch", "1", "collapse", "layer_1", "3", "expert 0 gets 4.0 times its share"]]
    (section,) = build(experiment).sections
    assert any("Alarms were raised while training Switch" in caution for caution in section.cautions)


def test_figures_of_time_and_of_drops_by_position(experiment: Path) -> None:
    rows = [("step", "stage", "layer", "bin", "asked", "dropped")]
    rows += [(2, stage, "layer_1", n, 10, n) for stage in ("train_step", "final_pass") for n in range(4)]
    with open(experiment / "switch" / "drop_by_position.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    page = write_report(experiment, quiet=True).read_text()
    names = {path.stem for path in (experiment / "report_files").glob("*.png")}
    assert {"step_time", "drops_by_position"} <= names
    assert "Drops by position" in page


def test_runs_without_these_measurements_have_no_empty_tables(tmp_path: Path) -> None:
    write_run(tmp_path / "only", "TopK", without=("validation/loss",))
    titles = [title.partition(":")[0] for title in tables(tmp_path)]
    assert titles == ["The arms", "Quality, speed and cost; loss against speed", "Balance"]
