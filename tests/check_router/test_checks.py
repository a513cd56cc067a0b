"""Each check finds the router that breaks its promise, and says so in a sentence; a router that keeps all passes."""

import pytest
import torch
import wrong_routers
from router_arms import subject_of

from lightning_base.check_router import ALL, NotAsked, Outcome, Subject, checks, command
from lightning_base.check_router.check import outcome
from lightning_base.check_router.command import asked_apart, main

# The check, a router that breaks it, and what the sentence says: what came out, and what would do.
WRONG = [
    ("construction", "LeavesMemory", "its parameter gate holds what was in memory", "at the end of __init__"),
    ("construction", "KnowsEightExperts", "built with num_experts=1 it raised", "go by self.num_experts"),
    ("refusals", "TakesAnything", "temperature=nan was accepted", "raise ValueError"),
    ("refusals", "TakesAnythingByPosition", "temperature=nan was accepted", "raise ValueError"),
    ("refusals", "TakesAnyWord", "scores=no_such_choice was accepted", "raise ValueError"),
    ("initial parameters", "HasASeedOfItsOwn", "gate is the same from two seeds", "no seed of its own"),
    ("initial parameters", "DrawsABufferOnce", "table was drawn differently twice", "draw it in reset_parameters"),
    ("plan", "CountsFromOne", "expert_index holds 8", "from 0 to 7"),
    ("plan", "ShowsLogits", "a row of aux['probabilities'] sums to -", "leave out what is none"),
    ("plan", "CountsSequencesAsTokens", "num_tokens of load_balancing_loss is 1", "it should be 64"),
    ("empty groups", "DividesByTokens", "load_balancing_loss is nan", "one finite number"),
    ("empty groups", "AveragesOverEmptyGroups", "for the groups that have none", "over the groups that hold tokens"),
    ("repetition", "DrawsFromTorch", "changed between two identical calls", "instead of torch.rand"),
    ("repetition", "DrawsForItsLoss", "its load_balancing_loss was 1.", "instead of torch.rand"),
    ("groups", "SeesAllGroups", "a token of another group went from expert", "each group by itself"),
    ("needs", "ReadsIdsInSecret", "when only token ids changed, token", "declare needs_token_ids = True"),
    ("needs", "ReadsSequencesInSecret", "its load_balancing_loss went from", "declare needs_sequences = True"),
    ("causality", "Peeks", "of 30 earlier ones did too", "declare causal = False"),
    ("causality", "PeeksOnceItHasLearnt", "earlier ones did too", "declare causal = False"),
    ("causality", "TooModest", "no earlier token heard of later ones", "declare causal = True"),
    ("load", "DropsInSilence", "asked for expert 3 and 0 were served", "it should be"),
    ("equal loads", "ClaimsEqualLoads", "experts serve [", "equal by construction"),
    ("equal loads", "ClaimsEqualLoadsOfAnyNumber", "experts serve [", "equal by construction"),
    ("step sums", "HandsOnMeans", "as the sum over three passes", "divide in end_step"),
    ("step sums", "AveragesNothing", "confidence=[", "divide in end_step"),
    ("padding", "CountsPadding", "all padding was added, step_sums gave demand", "count the tokens it was given"),
    ("padding", "MakesRoomForPadding", "capacity went from", "count the tokens it was given"),
    ("gate gradient", "Detaches", "gate got no gradient from the layer's output", "without detach()"),
    ("gate gradient", "DetachesHalf", "(a finite difference, in float64), and the gradient says", "let the gradient"),
    ("gate gradient", "HasNoSlope", "a gradient that is not finite", "away from 0"),
    ("gate gradient", "StraightThroughToNothing", "gate got no gradient", "without detach()"),
    ("gate gradient", "StraightThroughInSecret", "its gates change by 0 (", "declare straight_through = True"),
    ("gate gradient", "ClaimsStraightThrough", "it declares straight_through = True, and", "straight_through = False"),
    ("auxiliary losses", "LossOfCounts", "gives no parameter a gradient", "not detached"),
    ("auxiliary losses", "LossWithoutSlope", "load_balancing_loss is not finite", "away from 0"),
    ("accumulation", "CountsPasses", "router.bias differed by 3 between", "end_step divides them"),
    ("ranks", "KnowsItsRank", "on two ranks", "by the routing group"),
    ("recomputation", "RemembersInForward", "computed again in the backward pass", "forward may change nothing"),
    ("state", "RemembersOutsideBuffers", "after it was saved and loaded", "keep what is remembered in buffers"),
    ("state", "RemembersItsLossOutsideBuffers", "its load_balancing_loss went from", "keep what is remembered"),
    ("float64", "AlwaysFloat32", "its weight is torch.float32", "full_precision"),
    ("float64", "SecretlyFloat32", "not when they move by 1e-10", "full_precision"),
    ("float64", "RoundsItsLoss", "its load_balancing_loss changes when tokens move by 0.001", "full_precision"),
    ("mixed precision", "UnderAutocast", "under autocast to bfloat16", "enabled=False"),
    ("mixed precision", "LossUnderAutocast", "its load_balancing_loss", "enabled=False"),
    ("mixed precision", "RefusesHalfPrecision", "it raised RuntimeError", "given tokens in torch.bfloat16"),
    ("few or equal tokens", "DividesBySpread", "given one token, a weight is inf", "not finite"),
    ("few or equal tokens", "HasNoSlopeAtZero", "the gradient of its gates is not finite", "away from 0"),
    ("not a number", "RoundsWhatIsNoNumber", "it raised RuntimeError", "given one token of nan"),
]
BY_NAME = {check.name: check for check in ALL}


def subject(router: str, seconds: float = 120.0) -> Subject:
    return Subject(f"wrong_routers.{router}", seconds=seconds)


@pytest.mark.parametrize(("check", "router", "came_out", "would_do"), WRONG, ids=[case[1] for case in WRONG])
def test_a_broken_promise_is_told_by_its_check(check: str, router: str, came_out: str, would_do: str) -> None:
    found = outcome(BY_NAME[check], subject(router))
    assert found.verdict == "broken"
    assert came_out in found.sentence
    assert would_do in found.sentence
    assert "\n" not in found.sentence


def test_every_check_has_a_router_that_breaks_it() -> None:
    assert {case[0] for case in WRONG} == set(BY_NAME)


@pytest.mark.parametrize("check", checks(wrong_routers.Right), ids=str)
def test_a_router_that_keeps_every_promise_passes(check) -> None:
    if str(check) == "equal loads":
        with pytest.raises(NotAsked, match="no plan says equal_loads"):
            check()
    else:
        check()


@pytest.mark.parametrize(
    ("router", "options", "check"),
    [
        ("wrong_routers.StraightThrough", {}, "gate gradient"),
        ("top_k", {"capacity_factor": 2.0}, "causality"),
        ("top_k", {"capacity_factor": 2.0, "num_experts": 4}, "causality"),
        ("gshard", {"num_experts": 2}, "causality"),
        ("expert_choice", {"num_experts": 2}, "causality"),
        ("expert_choice", {"num_experts": 3}, "equal loads"),
        ("switch", {"gate": "one", "capacity_factor": 0.5}, "gate gradient"),
        ("switch", {"gate": "one", "capacity_factor": 0.5}, "float64"),
    ],
)
def test_what_only_looks_wrong_passes(router: str, options: dict, check: str) -> None:
    found = Subject(router, options) if "." in router else subject_of(router, **options)
    assert outcome(BY_NAME[check], found) == Outcome("ok")


def test_the_random_numbers_of_whoever_asks_are_left_alone() -> None:
    before = torch.get_rng_state()
    outcome(BY_NAME["repetition"], subject("DrawsFromTorch"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("router", "check", "reason"),
    [
        ("uniform", "gate gradient", "no parameters"),
        ("uniform", "auxiliary losses", "no auxiliary losses"),
        ("uniform", "step sums", "hands nothing on"),
        ("switch", "equal loads", "no plan says equal_loads"),
        ("switch of one expert", "gate gradient", "nothing to choose"),
        ("switch of one expert", "auxiliary losses", "nothing to balance"),
    ],
)
def test_what_has_no_meaning_is_not_asked_with_the_reason(router: str, check: str, reason: str) -> None:
    name, of_one, _ = router.partition(" of one expert")
    found = outcome(BY_NAME[check], subject_of(name, num_experts=1) if of_one else subject_of(name))
    assert found.verdict == "not asked"
    assert reason in found.sentence


def test_a_router_that_never_ends_is_ended_and_told() -> None:
    found = asked_apart("plan", subject("LoopsForever", seconds=1.0), [])
    assert found.verdict == "broken"
    assert "still running after 1 s" in found.sentence


def test_a_router_that_ends_its_process_is_told() -> None:
    found = asked_apart("plan", subject("EndsEverything"), [])
    assert found == Outcome("broken", "it raised SystemExit: 3: a router may not end the process it runs in")


def test_the_exit_code_is_0_where_nothing_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "ALL", [BY_NAME["construction"], BY_NAME["equal loads"]])
    assert main(["switch", "num_experts=4", "--seconds", "120"]) == 0
    assert "lightning_base.routing.switch.Switch: 1 ok, 1 not asked" in capsys.readouterr().out
