"""Verdicts by hand, and pairs that are none."""

from pathlib import Path

import pytest

from lightning_base.claims import inside, why
from lightning_base.claims.page import fill, table
from lightning_base.claims.paper import balance, one_large_layer
from lightning_base.claims.studies import MissingError, Studies, best, difference, loss_at, mean
from lightning_base.claims.verdict import Verdict, above, below, every, signed, within
from lightning_base.results.statistics import interval
from tests.report.hand_made_runs import write_run

LOSSES = {"BASE": (5.0, 5.1, 5.2), "Switch": (4.0, 4.1, 4.3), "TopK": (4.5, 4.7, 4.6), "Hash": (5.0, 5.2, 5.1)}


@pytest.fixture
def studies(tmp_path: Path) -> Studies:
    for router, losses in LOSSES.items():
        for seed, loss in enumerate(losses, 1):
            write_run(tmp_path / "compare" / f"{router}_{seed}", router, loss, seed=seed)
    return Studies(tmp_path)


# The interval of -3, -2, -1 is -2 -+ 4.3027 / sqrt(3) = -4.484 to 0.484; of -3, -2.9, -3.1 it is -3.248 to -2.752.
WIDE, SURE = interval([-3.0, -2.0, -1.0]), interval([-3.0, -2.9, -3.1])


def test_only_a_whole_interval_decides() -> None:
    assert below(SURE) is Verdict.HOLDS
    assert above(SURE) is Verdict.FAILS
    assert below(WIDE) is above(WIDE) is Verdict.UNDECIDED
    assert below(SURE, -3.0) is Verdict.UNDECIDED
    assert below(SURE, -3.5) is Verdict.FAILS
    assert below(interval([-3.0])) is Verdict.UNDECIDED
    assert [within(SURE, limit) for limit in (4.0, 3.0, 1.0)] == [Verdict.HOLDS, Verdict.UNDECIDED, Verdict.FAILS]


def test_one_failure_fails_all_and_one_doubt_leaves_doubt() -> None:
    held, failed, open_ = Verdict.HOLDS, Verdict.FAILS, Verdict.UNDECIDED
    assert every([held, held]) is held
    assert every([held, open_]) is open_
    assert every([open_, failed, held]) is failed


def test_differences_are_taken_seed_by_seed(studies: Studies) -> None:
    # 5.0 - 4.0, 5.1 - 4.1, 5.2 - 4.3: mean 29/30, deviation 0.1 / sqrt(3), interval 4.3027 times a third of 0.1.
    found = difference(studies.arm("compare", "BASE"), studies.arm("compare", "Switch"))
    assert found.mean == pytest.approx(29 / 30)
    assert found.margin == pytest.approx(4.3027 * 0.1 / 3, abs=1e-4)
    assert signed(found) == "+0.9667 [+0.8232, +1.1101]"


def test_runs_that_read_other_batches_are_no_pair(tmp_path: Path) -> None:
    write_run(tmp_path / "compare" / "a", "BASE", seed=1)
    write_run(tmp_path / "compare" / "b", "Switch", seed=1, manifest={"batch_fingerprint": "f" * 32})
    studies = Studies(tmp_path)
    with pytest.raises(ValueError, match="differ in batch_fingerprint: they are no pair"):
        difference(studies.arm("compare", "BASE"), studies.arm("compare", "Switch"))


def test_another_model_is_a_pair_only_where_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path / "compare" / "a", "BASE", seed=1)
    write_run(tmp_path / "compare" / "b", "Switch", 4.0, seed=1, manifest={"initial_weights_fingerprint": "f" * 64})
    studies = Studies(tmp_path)
    base, switch = studies.arm("compare", "BASE"), studies.arm("compare", "Switch")
    with pytest.raises(ValueError, match="differ in initial_weights_fingerprint"):
        difference(base, switch)
    assert difference(base, switch, same_model=False).mean == pytest.approx(1.0)


def test_what_has_not_run_is_named(studies: Studies) -> None:
    with pytest.raises(MissingError, match="gate has not run: make experiment EXPERIMENT=gate"):
        studies.arm("gate", "BASE")
    with pytest.raises(MissingError, match="compare has no finished run of Dense"):
        studies.arm("compare", "Dense")


def test_a_damaged_run_is_left_out_and_named(studies: Studies) -> None:
    path = studies.runs / "compare" / "Hash_2" / "manifest.json"
    path.write_text(path.read_text().replace('"tokens": 64', '"tokens": 65'))
    assert list(studies.arm("compare", "Hash")) == [1, 3]
    assert [job.name for job in studies.left_out] == ["compare/Hash_2"]


def test_the_best_of_a_grid_is_that_of_the_lowest_mean(studies: Studies) -> None:
    assert best({name: studies.arm("compare", name) for name in LOSSES}) == "Switch"


def test_a_loss_between_two_validations_lies_on_the_line(studies: Studies) -> None:
    (run, *_) = studies.arm("compare", "BASE").values()
    curve = run.series["validation/loss"]
    middle = (curve.steps[0] + curve.steps[1]) / 2
    assert loss_at(float(middle))(run) == pytest.approx((curve.values[0] + curve.values[1]) / 2)


def test_balance_holds_where_nothing_is_ever_over_its_share(studies: Studies) -> None:
    judged = balance(studies)
    assert judged.verdict is Verdict.HOLDS
    # Switch: [5, 4, 2, 2] has mean 3.25; it drops 3 of 16.
    assert judged.rows[2] == ["Switch", "0.538", "load_balancing_loss x 0.01", "18.8 %"]


def test_a_claim_that_the_numbers_contradict_does_not_hold(studies: Studies) -> None:
    # BASE is 0.5, 0.4 and 0.6 above top-2.
    judged = one_large_layer(studies)
    assert judged.verdict is Verdict.FAILS
    assert judged.rows[0] == ["arm", "parameters", "FLOPs a token", "loss", "BASE minus it"]
    assert judged.rows[2][4].startswith("+0.5000 [+0.2516, +0.7484]")


def test_the_page_keeps_what_has_not_run_and_says_so(studies: Studies, tmp_path: Path) -> None:
    page = tmp_path / "claims.md"
    page.write_text(
        "before\n<!-- begin verdicts -->\n<!-- end verdicts -->\n<!-- begin gates -->\nold\n<!-- end gates -->\nafter"
    )
    missing = fill(page, [balance(studies), ("Speed.", "not timed")], why.TABLES, studies)
    text = page.read_text()
    assert missing == ["gates: gate has not run: make experiment EXPERIMENT=gate"]
    assert (
        "| 1 | Balanced loads are guaranteed, without an auxiliary loss or a new hyperparameter. | **holds** |" in text
    )
    assert "| 2 | Speed. | **not judged: not timed** |" in text
    assert "\nold\n" in text
    assert text.startswith("before")
    assert text.endswith("after")


def test_the_page_says_of_which_commit_the_runs_are(studies: Studies, tmp_path: Path) -> None:
    for seed in (1, 2):
        changes = {"model.shuffle_tokens": seed == 2}
        write_run(tmp_path / "gate" / str(seed), seed=seed, changes=changes, manifest={"git_commit": "e" * 40})
    page = tmp_path / "claims.md"
    page.write_text("<!-- begin conditions -->\n<!-- end conditions -->\n<!-- begin asked -->\n<!-- end asked -->\n")
    tables = {"asked": lambda studies: [["losses"], *[[str(run.seed)] for run in studies.experiment("gate")]]}
    assert fill(page, [], tables, studies) == []
    own = str(studies.experiment("compare")[0].manifest["git_commit"])[:12]
    assert f"code at commit {own}, " in page.read_text()
    assert " At commit eeeeeeeeeeee: gate." in page.read_text()


def test_a_checkpoint_that_cannot_be_read_leaves_its_table_as_it_was(studies: Studies, tmp_path: Path) -> None:
    """Such as one in a single file, which an older version wrote."""
    run = studies.arm("compare", "BASE")[1]
    with pytest.raises(MissingError, match="BASE_1 has no checkpoint"):
        inside.centroids(run)
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints" / "step_4.ckpt").write_bytes(b"an older format")
    with pytest.raises(MissingError, match=r"step_4\.ckpt is a single file"):
        inside.centroids(run)


def test_what_shuffling_changes_is_a_difference_of_pairs(tmp_path: Path) -> None:
    for group in (2, 4, 8):
        for router, on, losses in (
            ("BASE", False, (5.0, 5.0, 5.0)),
            ("BASE", True, (5.1, 5.2, 5.3)),
            ("Switch", False, (4.0, 4.1, 4.2)),
            ("Switch", True, (4.0, 4.1, 4.2)),
        ):
            for seed, loss in enumerate(losses, 1):
                changes = {"data.routing_group": group, "model.shuffle_tokens": on}
                write_run(tmp_path / "shuffle" / f"{router}{group}{on}{seed}", router, loss, seed=seed, changes=changes)
    rows = why.shuffles(Studies(tmp_path))
    assert len(rows) == 7
    # 0.1, 0.2, 0.3: 0.2 -+ 4.3027 * 0.1 / sqrt(3). Switch drops 3 of 16 in both.
    assert rows[1] == ["2", "base", "5.0000 ± 0.0000", "+0.2000 [-0.0484, +0.4484]", "", ""]
    assert rows[2][4:] == ["18.8 ± 0.0", "+0.0 [+0.0, +0.0]"]


def test_arms_are_held_against_one_with_corrected_p_values(studies: Studies) -> None:
    arms = {name: studies.arm("compare", name) for name in ("BASE", "Switch", "Hash")}
    rows = why.against("BASE", arms)
    assert [row[0] for row in rows] == ["arm", "BASE", "Switch", "Hash"]
    # Switch is 1.0, 1.0 and 0.9 below: t = 29, two degrees of freedom, p = 1 - t / sqrt(t^2 + 2) = 0.00119, twice.
    assert rows[2][3].startswith("-0.9667")
    assert rows[2][4] == "0.002"
    assert "Hash" in table(rows)
    assert mean(arms["Hash"]).mean == pytest.approx(5.1)
