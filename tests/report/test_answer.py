"""The sentences follow the numbers: no order of arms is written down anywhere."""

from pathlib import Path

import pytest
from hand_made_runs import edit, write_run, write_seeds

from lightning_base.report.answer import all_contrasts, not_quiet
from lightning_base.report.document import Section, build
from lightning_base.report.tables import Strong, Table, difference
from lightning_base.results.fairness import Arm, Comparison, setting
from lightning_base.results.read import Run, read_job

BASE, SWITCH = (5.0, 5.2, 5.4), (4.0, 4.6, 4.9)


def section_of(folder: Path, **losses: tuple[float, ...]) -> Section:
    write_seeds(folder, **losses)
    (section,) = build(folder).sections
    return section


def strong(table: Table) -> set[tuple[int, int]]:
    """Row and column of what is beyond noise."""
    return {(i, j) for i, row in enumerate(table.rows) for j, text in enumerate(row) if isinstance(text, Strong)}


def test_a_difference_beyond_noise_is_the_answer(tmp_path: Path) -> None:
    section = section_of(tmp_path, BASE=BASE, Switch=SWITCH)
    # -1.0, -0.6, -0.5: mean -0.7, standard deviation sqrt(0.14 / 2) = 0.26458, margin 4.3027 x 0.26458 / sqrt(3).
    assert section.answer == [
        "Against BASE (5.2000 nats per token, 3 paired seeds), the validation loss is lower with Switch "
        "(−0.7000 ± 0.6572)."
    ]
    # t = 0.7 / (0.26458 / sqrt(3)) = 4.5826 with 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2).
    assert section.tables[0].rows[1][3:5] == ["−0.7000 ± 0.6572", "0.044"]
    assert strong(section.tables[0]) == {(1, 3)}


def test_another_arm_makes_the_same_difference_less_certain(tmp_path: Path) -> None:
    section = section_of(tmp_path, BASE=BASE, Switch=SWITCH, TopK=(5.1, 5.1, 5.41))
    # Holm: two arms are held against BASE, and the smaller p is doubled.
    assert section.answer[0].endswith("the validation loss is within the noise with Switch and TopK.")
    assert section.tables[0].rows[1][4] == "0.089"
    assert strong(section.tables[0]) == set()


def test_if_the_losses_change_places_so_do_the_arms(tmp_path: Path) -> None:
    section = section_of(tmp_path, BASE=SWITCH, Switch=BASE)
    assert section.answer[0].endswith("the validation loss is higher with Switch (+0.7000 ± 0.6572).")


def test_base_is_held_against_the_arms_that_are_not_the_reference(tmp_path: Path) -> None:
    # BASE, BASE1 and so on come before Dense and Switch; what is first in the folder is the reference.
    section = section_of(tmp_path, ASwitch=(4.0, 4.2, 4.4), BASE=(4.5, 4.72, 4.9), TopK=(4.0, 4.21, 4.4))
    first, second = section.answer
    assert first.startswith("Against ASwitch (4.2000 nats per token, 3 paired seeds)")
    assert "higher with BASE (+0.5067 ± 0.0287)" in first
    assert "within the noise with TopK" in first
    # TopK minus BASE: -0.5, -0.51, -0.5.
    assert second == "BASE is beaten by TopK (−0.5033 ± 0.0143)."


def test_the_reference_is_the_arm_with_one_expert(tmp_path: Path) -> None:
    arms = []
    for router, experts in (("Switch", 4), ("Dense", 1)):
        run = read_job(write_run(tmp_path / router, router, ledger={"num_experts": experts}), router)
        assert isinstance(run, Run)
        arms.append(Arm((run,)))
    assert Comparison(tuple(arms), setting(arms)).reference is arms[1]
    assert Comparison(tuple(arms[:1]), setting(arms[:1])).reference is arms[0]


def test_one_seed_ranks_nothing(tmp_path: Path) -> None:
    section = section_of(tmp_path, BASE=(5.0,), Switch=(4.5,))
    assert section.answer == [
        "One seed does not support a ranking. The validation losses are BASE 5.0000 and Switch 4.5000 nats per token; "
        "seed=1,2,3 gives intervals."
    ]
    assert strong(section.tables[0]) == set()
    assert "p" not in section.tables[0].headings
    assert not any("±" in cell for table in section.tables for row in table.rows for cell in row)


def test_only_seeds_that_both_arms_have_are_compared(tmp_path: Path) -> None:
    section = section_of(tmp_path, BASE=(*BASE, 5.6), Switch=SWITCH)
    ((gap,),) = (gaps.values() for gaps in all_contrasts(section.comparison).values())
    assert gap.values == pytest.approx((-1.0, -0.6, -0.5))
    assert section.cautions == [
        "Not every arm has every seed: Switch lacks 4. Differences are over the seeds that both arms have."
    ]
    assert [row[1] for row in section.tables[0].rows] == ["4", "3 of 4"]


@pytest.mark.parametrize("router", ["BASE", "Switch"])
def test_a_single_arm_is_compared_with_nothing(tmp_path: Path, router: str) -> None:
    assert "no other arm" in section_of(tmp_path, **{router: (5.0,)}).answer[0]


def test_an_arm_that_learnt_nothing_is_named(tmp_path: Path) -> None:
    (caution,) = section_of(tmp_path, BASE=(5.0,), Switch=(6.0,)).cautions
    assert "6.0000 nats (unigram entropy)" in caution
    assert caution.endswith("not below it: Switch.")


def test_exactly_even_training_is_read_from_the_logs(tmp_path: Path) -> None:
    balance = next(t for t in section_of(tmp_path, BASE=(5.0,), Switch=(4.5,)).tables if t.title.startswith("Balance"))
    assert "exactly even in BASE and up to 0.54 above even in Switch" in balance.lead


def test_a_loss_that_looks_at_later_tokens_wins_nothing(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        ahead = {"evaluation_modes": {"default": False}}
        write_run(tmp_path / f"c{seed}", "ExpertChoice", 4.0 + seed / 10, seed=seed, ledger=ahead)
    section = section_of(tmp_path, BASE=BASE, Switch=SWITCH)
    assert not any("ExpertChoice" in sentence for sentence in section.answer)
    # Of the p values of two arms, not three: as if ExpertChoice were not there.
    assert section.tables[0].rows[1][3:5] == ["−0.7000 ± 0.6572", "0.044"]
    ahead_row = next(row for row in section.tables[0].rows if row[0].startswith("ExpertChoice"))
    assert ahead_row[0].endswith("‡")
    assert ahead_row[3:5] == ["–", "–"]
    assert section.cautions[0].startswith("Not ranked")
    assert "ExpertChoice (4.2000)" in section.cautions[0]


def test_a_loss_that_is_not_finite_is_in_no_difference(tmp_path: Path) -> None:
    section = section_of(tmp_path, BASE=BASE, Switch=SWITCH, TopK=(5.0, 5.1, float("inf")))
    assert "A validation loss is not finite, and is in no difference: TopK." in section.cautions
    (gaps,) = all_contrasts(section.comparison).values()
    assert [(arm.router, len(gap.values)) for arm, gap in gaps.items()] == [("Switch", 3), ("TopK", 2)]


def test_a_single_shared_seed_is_not_ranked_beside_arms_with_several(tmp_path: Path) -> None:
    section = section_of(tmp_path, BASE=BASE, Switch=SWITCH, TopK=(3.0,))
    assert section.answer[0].endswith(
        "3 paired seeds), the validation loss is lower with Switch (−0.7000 ± 0.6572). "
        "Not ranked, with one seed in common: TopK."
    )


def test_a_run_that_went_on_elsewhere_or_from_an_older_checkpoint_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "BASE", 5.0)
    moved = [
        {"from_step": 0, "world_size": 2, "strategy": "ddp", "accumulation": 1},
        {"from_step": 3, "world_size": 1, "strategy": "single", "accumulation": 2},
    ]
    passed = {"checkpoint": "step_4.ckpt", "reason": "the checkpoint step_4.ckpt is damaged: state.pt is missing"}
    resumes = [{"step": 3, "checkpoint": "step_3.ckpt", "time": 0.0, "passed_over": [passed]}]
    write_run(tmp_path / "b", "Switch", 4.5, manifest={"layouts": moved, "resumes": resumes})
    (section,) = build(tmp_path).sections
    assert section.cautions == [
        "Went on with other ranks or another accumulation, so that its speed is of several: Switch, seed 1 "
        "(from step 0 ddp with 2 ranks and accumulation 1, from step 3 single with 1 rank and accumulation 2).",
        "Switch, seed 1, went on from an older checkpoint: the checkpoint step_4.ckpt is damaged: state.pt is missing.",
    ]


def test_speeds_of_runs_that_shared_the_machine_are_not_compared(tmp_path: Path) -> None:
    # BASE and Switch overlap by a second, TopK begins when both have ended, Hash ran elsewhere at the same time.
    times = {
        "BASE": ("a", 10.0, 20.0),
        "Switch": ("a", 19.0, 29.0),
        "TopK": ("a", 29.0, 39.0),
        "Hash": ("b", 10.0, 39.0),
    }
    for router, (host, started, ended) in times.items():
        run = write_run(tmp_path / router, router)
        for key, value in {"host": host, "started": started, "updated": ended}.items():
            edit(run / "status.json", key, value)
    (section,) = build(tmp_path).sections
    (caution,) = section.cautions
    assert caution.endswith("runs shared the machine with others of this table: BASE and Switch.")
    assert {arm.label: sign for arm, sign in not_quiet(section.comparison.arms).items()} == {
        "BASE": "§",
        "Switch": "§",
        "TopK": "",
        "Hash": "",
    }
    assert any(note.startswith("§ The machine was not quiet") for note in section.notes)


def test_a_difference_that_rests_on_uncertain_speeds_is_not_marked(tmp_path: Path) -> None:
    section = section_of(tmp_path, BASE=BASE, Switch=(4.0, 4.2, 4.45))
    (gaps,) = all_contrasts(section.comparison).values()
    (sure,) = (gap for gap in gaps.values() if gap.decided)
    assert isinstance(difference(sure), Strong)
    assert not isinstance(difference(sure, "§"), Strong)
    assert difference(sure, "§") == difference(sure) + "§"


def test_another_number_of_threads_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "BASE", "BASE")
    write_run(tmp_path / "Switch", "Switch", manifest={"device": "x86_64, 2 threads"})
    (section,) = build(tmp_path).sections
    (caution,) = section.cautions
    assert caution == (
        "Speeds are not comparable, the arms did not run in the same way: BASE device=x86_64, 1 threads; Switch "
        "device=x86_64, 2 threads."
    )
