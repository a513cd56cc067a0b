"""Recordings hand-fed with the plans of every router, and the replay router on top. T tokens, E experts, G groups."""

import copy
import json
from pathlib import Path

import pytest
import torch
from router_arms import ROUTERS, WIDTH, build_router, decisions, groups_of, random_tokens

from lightning_base.program.run_directory import write_json
from lightning_base.routing import Replay, Router, RoutingGroups, RoutingPlan
from lightning_base.routing.recording import (
    FOLDER,
    INDEX,
    digest_groups,
    file_name,
    read_pass,
    split_plan,
    write_pass,
)

STEPS, LAYER = 2, "layer_1"
SIZES = (20, 24, 16)
CONFIG = {
    "seed": 1,
    "data": {"global_batch": 3},
    "model": {"depth": 2},
    "trainer": {"max_steps": STEPS, "validate_every_n_steps": STEPS, "devices": 1, "num_nodes": 1},
}


def plans_of(router: Router, step: int) -> RoutingPlan:
    """What a router decides about three groups of a step; another text at every step."""
    tokens, ids = random_tokens(sum(SIZES), seed=step)
    with torch.no_grad():
        return copy.deepcopy(router)(tokens, ids, groups_of(*SIZES))


def record(folder: Path, router: Router, ranks: int = 1) -> dict[tuple[str, int], RoutingPlan]:
    """Writes the run directory of a source that routed with ``router``; gives its plans by stage and step."""
    modes = router.evaluation_modes
    finals = ["final", *(f"final_{mode}" for mode in list(modes)[1:])]
    passes = [("train", step) for step in range(STEPS)]
    passes += [(stage, STEPS) for stage in ("validation", *finals)]
    found = {}
    for stage, step in passes:
        router.train(stage == "train")
        router.evaluation_mode = (
            stage.removeprefix("final_") if stage.startswith("final_") else router.default_evaluation_mode
        )
        plan = plans_of(router, step)
        _, ids = random_tokens(sum(SIZES), seed=step)
        parts = list(zip(digest_groups(ids, plan.groups), split_plan(plan), strict=True))
        for rank in range(ranks):
            path = folder / FOLDER / stage / file_name(step, rank, ranks)
            write_pass(path, {LAYER: dict(parts[rank::ranks])})
        found[stage, step] = plan
    files = {str(path.relative_to(folder / FOLDER)): path.stat().st_size for path in folder.rglob("*.npz")}
    facts = {
        "num_experts": router.num_experts,
        "top_k": router.top_k,
        "asks_for_fewer": router.asks_for_fewer,
        "causal": router.causal,
        "evaluation_modes": dict(modes),
        "layers": [LAYER],
    }
    write_json(folder / FOLDER / INDEX, {"router": facts, "files": files})
    trainer = {**CONFIG["trainer"], "devices": ranks}
    write_json(folder / "manifest.json", {"config": {**CONFIG, "trainer": trainer}})
    write_json(folder / "status.json", {"state": "done"})
    read_pass.cache_clear()
    return found


def replay(folder: Path, **options: object) -> Replay:
    router = build_router("replay", source=str(folder), **options)
    assert isinstance(router, Replay)
    router.layer = LAYER
    return router


def same_plan(one: RoutingPlan, other: RoutingPlan) -> bool:
    def slots(plan: RoutingPlan) -> list[int] | None:
        return None if plan.capacity is None else plan.capacity.tolist()

    same = decisions(one) == decisions(other) and torch.equal(one.group_demand, other.group_demand)
    return same and slots(one) == slots(other) and one.top_k == other.top_k


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_replayed_plan_is_the_plan_whatever_router_and_ranks(name: str, ranks: int, tmp_path: Path) -> None:
    source = build_router(name)
    recorded = record(tmp_path, source, ranks)
    router = replay(tmp_path)
    for step in range(STEPS):
        assert same_plan(plans_of(router.train(), step), recorded["train", step])
        router.end_step({})
    router.eval()
    for mode in router.evaluation_modes:
        router.evaluation_mode = mode
        stage = "final" if mode == router.default_evaluation_mode else f"final_{mode}"
        assert same_plan(plans_of(router, STEPS), recorded[stage, STEPS])
    for fact in ("num_experts", "top_k", "asks_for_fewer", "causal", "evaluation_modes"):
        assert getattr(router, fact) == getattr(source, fact), fact


def test_groups_are_found_by_their_text_wherever_they_are(tmp_path: Path) -> None:
    recorded = record(tmp_path, build_router("switch", capacity_factor=0.5))["train", 0]
    router = replay(tmp_path)
    tokens, ids = random_tokens(sum(SIZES), seed=0)
    expected = list(torch.tensor(range(sum(SIZES))).split(SIZES))
    # The last group, then an empty one, then the first: as on a rank with other groups, at the end of an evaluation.
    order = torch.cat([expected[2], expected[0]])
    plan = router(tokens[order], ids[order], groups_of(16, 0, 20))
    before = decisions(recorded)
    assert decisions(plan) == before[44:] + before[:20]
    assert plan.group_demand.tolist() == [recorded.group_demand[2].tolist(), [0] * 8, recorded.group_demand[0].tolist()]
    # ceil(0.5 T / 8): 1 for 16 tokens, 2 for 20.
    assert plan.capacity is not None
    assert plan.capacity.tolist() == [1, 0, 2]


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0)], ids=str)
def test_groups_without_tokens_need_no_source(sizes: tuple[int, ...], tmp_path: Path) -> None:
    record(tmp_path, build_router("top_k"))
    plan = replay(tmp_path)(*random_tokens(0), groups_of(*sizes))
    assert len(plan.token_index) == 0
    assert plan.group_demand.tolist() == [[0] * 8] * len(sizes)


def test_weights_are_recorded_learned_or_one(tmp_path: Path) -> None:
    source = build_router("base", seed=3)
    recorded = record(tmp_path, source)["train", 0]
    # One name, one seed, one draw: centroids of its own start where those of BASE do, so that its gates are BASE's.
    learned = replay(tmp_path, weight="learned", seed=3)
    assert list(dict(learned.named_parameters())) == ["centroids"]
    tokens, ids = random_tokens(sum(SIZES), seed=0)
    plan = learned(tokens, ids, groups_of(*SIZES))
    assert torch.equal(plan.expert_index, recorded.expert_index)
    torch.testing.assert_close(plan.weight.detach(), recorded.weight)
    plan.weight.sum().backward()
    assert bool(learned.centroids.grad.abs().sum() > 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(learned(tokens, ids, groups_of(*SIZES)).weight, plan.weight)

    for weight, expected in (("recorded", recorded.weight), ("one", torch.ones(sum(SIZES)))):
        router = replay(tmp_path, weight=weight)
        assert list(router.parameters()) == []
        assert torch.equal(plans_of(router, 0).weight, expected)


def test_a_forward_pass_does_not_count_as_a_step(tmp_path: Path) -> None:
    recorded = record(tmp_path, build_router("top_k"))
    router = replay(tmp_path)
    for _ in range(3):
        assert same_plan(plans_of(router, 0), recorded["train", 0])
    assert router.state_dict()["step"].item() == 0


def test_another_text_is_one_sentence_with_source_step_and_layer(tmp_path: Path) -> None:
    record(tmp_path, build_router("top_k"))
    router = replay(tmp_path)
    tokens, ids = random_tokens(sum(SIZES), seed=0)
    ids[21] += 1
    sentence = (
        rf"router.source={tmp_path} has no plan of layer_1 for a routing group at step 0 \(train\): "
        "replay with the data, seed and number of steps"
    )
    with pytest.raises(LookupError, match=sentence):
        router(tokens, ids, groups_of(*SIZES))
    router.end_step({})
    with pytest.raises(LookupError, match="at step 1"):
        plans_of(router, 0)


def test_a_pass_that_belongs_to_no_step_costs_what_the_source_costs(tmp_path: Path) -> None:
    record(tmp_path, build_router("top_k"))
    router = replay(tmp_path)
    router.rehearsal = True
    plan = router(*random_tokens(30, seed=99), RoutingGroups((10, 20)))
    # Two experts of 8 for each of 30 tokens, in turn: 60 assignments, in the first group 20 = 2 * 8 + 4.
    assert len(plan.token_index) == 60
    assert plan.group_demand[0].tolist() == [3, 3, 3, 3, 2, 2, 2, 2]
    assert len(set(zip(plan.token_index.tolist(), plan.expert_index.tolist(), strict=True))) == 60


# What is refused before anything is spent


def break_nothing(folder: Path) -> None:
    pass


def unfinished(folder: Path) -> None:
    write_json(folder / "status.json", {"state": "preempted"})


def no_recording(folder: Path) -> None:
    (folder / FOLDER / INDEX).unlink()


def one_file_less(folder: Path) -> None:
    (folder / FOLDER / "train" / file_name(1, 0, 1)).unlink()


def one_file_cut_short(folder: Path) -> None:
    path = folder / FOLDER / "final" / file_name(STEPS, 0, 1)
    path.write_bytes(path.read_bytes()[:-1])


def recorded_by_another_version(folder: Path) -> None:
    index = json.loads((folder / FOLDER / INDEX).read_text())
    index["router"]["evaluation_modes"] = list(index["router"]["evaluation_modes"])
    write_json(folder / FOLDER / INDEX, index)


def no_run(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "options", "sentence"),
    [
        (unfinished, {}, "is preempted, and only a run that is done can be replayed"),
        (no_recording, {}, "recorded no plans: run it again, elsewhere, with trainer.record_plans=true"),
        (one_file_less, {}, "lacks 1 of 4 files of its recording, first plans/train/step_00000001"),
        (one_file_cut_short, {}, "lacks 1 of 4 files of its recording, first plans/final/step_00000002"),
        (no_run, {}, "is no run directory"),
        (recorded_by_another_version, {}, "was recorded by another version of lightning_base"),
        (break_nothing, {"num_experts": 4}, "router.num_experts=4 is not the 8 of router.source"),
        (break_nothing, {"top_k": 1}, "router.top_k=1 is not the 2 of router.source"),
        (break_nothing, {"weight": "two"}, "router.weight=two: choose one of recorded, learned, one"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_source_that_cannot_be_replayed_is_refused(damage, options: dict, sentence: str, tmp_path: Path) -> None:
    record(tmp_path, build_router("top_k"))
    damage(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        replay(tmp_path, **options)


def test_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a directory: give the directory of a run"):
        replay(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 2}, "seed=2 is not the 1 of router.source="),
        ({"data": {"global_batch": 6}}, "data.global_batch=6 is not the 3 of router.source="),
        ({"trainer": {**CONFIG["trainer"], "max_steps": 3}}, "trainer.max_steps=3 is not the 2 of router.source="),
    ],
    ids=["seed", "batch", "steps"],
)
def test_a_run_over_other_text_is_refused(change: dict, sentence: str, tmp_path: Path) -> None:
    record(tmp_path, build_router("top_k"))
    router = replay(tmp_path)
    router.check_run({**CONFIG, "trainer": {**CONFIG["trainer"], "devices": 4}})
    with pytest.raises(ValueError, match=sentence):
        router.check_run({**CONFIG, **change})


def test_a_file_that_changed_under_a_running_replay_is_named(tmp_path: Path) -> None:
    record(tmp_path, build_router("top_k"))
    router = replay(tmp_path)
    path = tmp_path / FOLDER / "train" / file_name(0, 0, 1)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ValueError, match=rf"the recording {path} cannot be read .*record the run again"):
        plans_of(router, 0)
    assert replay(tmp_path).num_experts == build_router("top_k", width=WIDTH).num_experts


def test_writing_a_pass_again_replaces_it_whole(tmp_path: Path) -> None:
    plan = plans_of(build_router("top_k"), 0)
    _, ids = random_tokens(sum(SIZES), seed=0)
    parts = dict(zip(digest_groups(ids, plan.groups), split_plan(plan), strict=True))
    path = tmp_path / "train" / file_name(0, 0, 1)
    write_pass(path, {})
    write_pass(path, {LAYER: parts})
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file is left"
    found = read_pass((path,))[LAYER]
    assert found.keys() == parts.keys()
    assert all((found[digest].token_index == parts[digest].token_index).all() for digest in parts)
