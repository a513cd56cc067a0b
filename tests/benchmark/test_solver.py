"""Which instance is the worst, and what it is held against; what a profile of a solve counts."""

from typing import Any

import pytest
import torch

from lightning_base.assignment import profile
from lightning_base.benchmark import solver


def instance(kind: str, floors: float) -> dict[str, Any]:
    return {"size": "8 x 2", "kind": kind, "variation": "as drawn", "ratios": {"cold / floor": floors}}


def test_repeated_tokens_have_an_aim_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [instance("common mean", 20.0), instance("Zipf clusters", 24.0), instance("Zipf repeats, bf16", 30.0)]
    monkeypatch.setattr(solver.assignment, "records", lambda quick: found)
    everywhere, others, repeated = solver.records("quick", False)
    assert (everywhere["ratio"], everywhere["measure"]) == (24.0, "median of instances")
    assert (others["arm"], others["ratio"], others["aim"]) == ("cold / floor", 24.0, 25.0)
    assert (repeated["arm"], repeated["ratio"], repeated["aim"]) == ("cold / floor, repeated tokens", 30.0, 35.0)


def test_a_profile_counts_searches_paths_and_tokens() -> None:
    # All six want expert 0, which has three places too few: three paths of one edge. So few scores take no Newton step.
    scores = torch.stack([torch.arange(1.0, 7.0), torch.zeros(6)], 1)
    seen = profile.profile(scores)
    assert (seen.newton_steps, seen.too_many, seen.rounds_of_paths) == (0, 3, 1)
    assert (seen.searches, seen.paths, seen.tokens_moved) == (3, 3, 3)
    assert seen.ms.keys() == set(profile.PHASES)
    assert all(ms >= 0 for ms in seen.ms.values())
