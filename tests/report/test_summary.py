"""The sentences follow the numbers: no order of arms is written down anywhere."""

from pathlib import Path

import pytest
from hand_made_runs import write_run

from lightning_base.report.document import build


def summary(folder: Path, **losses: float) -> list[str]:
    for router, loss in losses.items():
        write_run(folder / router, router, loss)
    (section,) = build(folder).sections
    return section.summary


def test_if_base_loses_the_summary_says_so(tmp_path: Path) -> None:
    first, second, *_ = summary(tmp_path, BASE=5.0, Switch=4.5, Dense=5.5)
    assert first == (
        "Switch has the lowest validation loss: 4.5000 nats per token, 0.5000 (10.00 %) below the next, BASE (5.0000)."
    )
    assert second == "BASE is number 2 of 3 with 5.0000: it loses to Switch by 0.5000 and beats Dense by 0.5000."


def test_if_the_losses_change_places_so_do_the_arms(tmp_path: Path) -> None:
    first, second, *_ = summary(tmp_path, BASE=4.5, Switch=5.0, Dense=5.5)
    assert first.startswith("BASE has the lowest validation loss: 4.5000 nats per token, 0.5000 (10.00 %)")
    assert second.endswith("it beats Switch by 0.5000 and Dense by 1.0000.")


def test_equal_losses_are_called_equal(tmp_path: Path) -> None:
    first, second, *_ = summary(tmp_path, BASE=5.0, Switch=5.0)
    assert first.startswith("BASE and Switch share the lowest")
    assert "it equals Switch" in second


def test_balanced_evaluation_is_stated_and_not_ranked(tmp_path: Path) -> None:
    # Balanced, BASE has 4.75: lower than Switch, which still comes first.
    sentences = summary(tmp_path, BASE=5.0, Switch=4.9)
    assert sentences[0].startswith("Switch has the lowest")
    assert "4.7500, 0.2500 lower" in sentences[2]


def test_every_arm_is_held_against_the_unigram_entropy(tmp_path: Path) -> None:
    text = " ".join(summary(tmp_path, BASE=5.0, Switch=4.5))
    assert "6.0000 nats (unigram entropy); BASE is 1.000 below it, Switch 1.500" in text


def test_an_arm_that_learnt_nothing_is_named(tmp_path: Path) -> None:
    assert "not below it: Switch." in " ".join(summary(tmp_path, BASE=5.0, Switch=6.5))


@pytest.mark.parametrize("router", ["BASE", "Switch"])
def test_a_single_arm_is_compared_with_nothing(tmp_path: Path, router: str) -> None:
    assert "no other arm" in summary(tmp_path, **{router: 5.0})[0]


def test_one_seed_may_be_noise(tmp_path: Path) -> None:
    assert "may be noise" in summary(tmp_path, BASE=5.0, Switch=4.5)[-1]


def test_exactly_even_training_is_read_from_the_logs(tmp_path: Path) -> None:
    text = " ".join(summary(tmp_path, BASE=5.0, Switch=4.5))
    assert "exactly even in BASE and up to 0.54 above even in Switch" in text


def test_a_loss_that_looks_at_later_tokens_wins_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "BASE", 5.0)
    write_run(tmp_path / "b", "Switch", 4.5)
    write_run(tmp_path / "c", "ExpertChoice", 4.0, ledger={"evaluation_modes": {"default": False}})
    (section,) = build(tmp_path).sections
    assert section.summary[0].startswith("Switch has the lowest validation loss")
    assert any(text.startswith("Not ranked") and "ExpertChoice (4.0000)" in text for text in section.summary)
    assert section.tables[0].strong == {(1, 1)}
