"""Whole subjects, as small as they go."""

from lightning_base.benchmark import harness


def test_a_real_run_and_the_bare_loop_take_turns_on_the_same_losses(small_corpus: list[str]) -> None:
    options = tuple(option for option in small_corpus if option not in ("debug=fast",))
    found = harness.compare("base", turns=4, overrides=("model=tiny", *options))
    shares = {record["arm"]: record for record in found}
    whole, around = shares["whole step"], shares["all around the work"]
    assert whole["rounds"] == around["rounds"] == 1
    parts = [
        r["ratio"] for name, r in shares.items() if name not in ("whole step", "all around the work", "load metrics")
    ]
    # With one turn the parts add up to the whole, but for rounding to four digits.
    assert abs(1 + sum(parts) - whole["ratio"]) < 0.01
    assert 0 < shares["ExpertLoadLogger"]["ratio"] < around["ratio"]
