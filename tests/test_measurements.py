"""What the real program measures about its routers, bracketed by routers of which one knows the answer."""

import csv
from pathlib import Path

import program
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_base.program.build import build_module
from lightning_base.program.read_config import read_config

EXPERTS = 4
STEPS = ("trainer.max_steps=4", "trainer.log_every_n_steps=2", "trainer.validate_every_n_steps=2")
PHASES = (
    "router",
    "assignment",
    "dispatch",
    "experts",
    "combine",
    "other_forward",
    "waiting",
    "backward_and_optimizer",
)
LEAKS = [f"leak_{mode}_{way}" for mode in ("training", "evaluation") for way in ("expert", "weight", "drop", "any")]
# 4 sequences of 32 tokens are a group, 4 groups a step; half of the tokens of a group are earlier ones.
TOKENS_PER_STEP = 16 * 32


@pytest.fixture(scope="module")
def runs(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories by arm; ``two_ranks`` is BASE again, ``switch`` has few slots."""
    folder = tmp_path_factory.mktemp("measurements")
    settings = {
        "alone": ("router=base,uniform,skewed",),
        "switch": ("router=switch", "router.capacity_factor=0.5", "router.evaluation_capacity_factor=0.5"),
        "two_ranks": ("router=base", "strategy=ddp", "trainer.devices=2"),
    }
    found: dict[str, Path] = {}
    for name, overrides in settings.items():
        many = ("-m",) if name == "alone" else ()
        done = program.train(
            *many,
            *small_corpus,
            *STEPS,
            f"router.num_experts={EXPERTS}",
            *overrides,
            f"runs_dir={folder}",
            f"name={name}",
        )
        assert done.returncode == 0, done.stderr
        for path in program.jobs(folder, name).values():
            router = program.read(path / "manifest.json")["ledger"]["router"].lower()
            found[name if name == "two_ranks" else router] = path
    assert set(found) == {"base", "uniform", "skewed", "switch", "two_ranks"}
    return found


def test_the_model_of_a_run_routes_in_the_groups_that_are_configured(runs: dict[str, Path]) -> None:
    module = build_module(read_config(yaml.safe_load((runs["base"] / ".hydra" / "config.yaml").read_text())))
    ids = torch.zeros(16, 32, dtype=torch.int64)
    _, plans = module({"input_ids": ids, "valid": torch.ones_like(ids, dtype=torch.bool)})
    assert [plan.groups.sizes for plan in plans.values()] == [(4 * 32,) * 4]


def last(path: Path, name: str) -> float:
    return program.series(path, name)[-1][1]


def rows(path: Path, file: str) -> list[dict[str, str]]:
    with open(path / file, newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.parametrize("arm", ["base", "switch", "two_ranks", "uniform"])
def test_tokens_that_change_their_experts_are_counted_after_a_step_and_since_the_last_validation(
    runs: dict[str, Path], arm: str
) -> None:
    validations = [step for step, _ in program.series(runs[arm], "validation/loss")]
    over = {name: dict(program.series(runs[arm], f"routing_change/{name}/mean")) for name in ("step", "validation")}
    assert list(over["validation"]) == validations[1:]
    assert list(over["step"]) == [step + 1 for step in validations[:-1]]
    for found in over.values():
        shares = list(found.values())
        assert all(0 <= share <= 1 for share in shares)
        # The position alone decides for uniform; a learning rate above 0 moves some tokens of the others.
        assert any(shares) == (arm != "uniform")


@pytest.mark.parametrize(("arm", "idle"), [("uniform", 0), ("skewed", 1 - 1 / EXPERTS), ("base", 0)])
def test_idle_experts_are_bracketed_by_uniform_and_skewed(runs: dict[str, Path], arm: str, idle: float) -> None:
    found = program.series(runs[arm], "train_step/idle_fraction_experts/layer_1")
    assert [step for step, _ in found] == [1, 2, 4]
    assert [value for _, value in found] == pytest.approx([idle] * 3, abs=1e-12)
    assert last(runs[arm], "train_micro_batch/batched_padding/mean") == pytest.approx(idle, abs=1e-12)
    # One rank waits for nobody.
    assert last(runs[arm], "train_step/idle_fraction/max") == pytest.approx(0, abs=1e-12)
    assert program.series(runs[arm], "train_step/capacity_padding/mean") == []


def test_final_numbers_are_in_the_manifest(runs: dict[str, Path]) -> None:
    for arm, path in runs.items():
        result = program.read(path / "manifest.json")["result"]
        names = [f"final_causality/{leak}/{over}" for leak in LEAKS for over in ("mean", "max")]
        names += ["final_pass/idle_fraction/mean", "final_pass/idle_fraction_experts/max"]
        names += ["final_micro_batch/batched_padding/mean"]
        names += ["final_balanced_pass/routing_gap/mean"] * (arm in ("base", "two_ranks"))
        for name in names:
            assert result[name] == last(path, name), name
            assert 0 <= result[name] < 1 or "routing_gap" in name
    assert program.read(runs["skewed"] / "manifest.json")["result"]["final_pass/idle_fraction_experts/mean"] == 0.75


def test_base_leaks_through_the_expert_in_training_and_not_at_all_in_evaluation(runs: dict[str, Path]) -> None:
    for arm in ("base", "two_ranks"):
        found = {leak: last(runs[arm], f"final_causality/{leak}/layer_1") for leak in LEAKS}
        assert found.pop("leak_training_expert") == found.pop("leak_training_any") > 0
        assert set(found.values()) == {0.0}


@pytest.mark.parametrize("arm", ["switch", "uniform", "skewed"])
def test_routers_that_look_back_only_leak_nothing(runs: dict[str, Path], arm: str) -> None:
    assert {last(runs[arm], f"final_causality/{leak}/{layer}") for leak in LEAKS for layer in ("layer_1", "max")} == {
        0.0
    }


def test_the_routing_gap_of_base_is_that_of_its_loads_at_least(runs: dict[str, Path]) -> None:
    path = runs["base"]
    gap = last(path, "final_balanced_pass/routing_gap/layer_1")
    assert last(path, "final_balanced_pass/routing_gap/mean") == gap
    load = {
        stage: [int(r["load"]) for r in rows(path, "expert_load.csv") if r["stage"] == stage]
        for stage in ("final_pass", "final_balanced_pass")
    }
    greedy, balanced = load.values()
    # Whatever one expert has less in the other mode has moved.
    moved = sum(max(0, a - b) for a, b in zip(greedy, balanced, strict=True)) / sum(greedy)
    assert 0 < moved <= gap <= 1
    for mode in ("final", "final_balanced"):
        assert last(path, f"{mode}/loss") > 0
    assert program.series(runs["switch"], "final_balanced_pass/routing_gap/mean") == []


def test_two_ranks_measure_what_one_does(runs: dict[str, Path]) -> None:
    one, two = (program.read(runs[arm] / "manifest.json")["result"] for arm in ("base", "two_ranks"))
    assert one.keys() == two.keys()
    for name in one:
        # Sums in another order: a token at a tie may go elsewhere. What one rank of two computes is no such number.
        if "idle_fraction/" not in name and "batched_padding" not in name:
            assert two[name] == pytest.approx(one[name], abs=0.01, rel=1e-3), name
    for index, tokens in ((0, 256), (1, 256)):
        found = [r for r in rows(runs["two_ranks"], "compute_balance.csv") if (r["step"], r["unit"]) == ("1", "rank")]
        assert (int(found[index]["index"]), int(found[index]["tokens"])) == (index, tokens)


def test_drops_by_position_add_up_to_the_drops_and_fall_on_the_end_of_the_group(runs: dict[str, Path]) -> None:
    found = [r for r in rows(runs["switch"], "drop_by_position.csv") if r["stage"] == "train_step"]
    assert sorted({int(r["step"]) for r in found}) == [1, 2, 4]
    for step in (1, 2, 4):
        asked, dropped = ([int(r[side]) for r in found if int(r["step"]) == step] for side in ("asked", "dropped"))
        assert asked == [TOKENS_PER_STEP // 16] * 16
        rate = dict(program.series(runs["switch"], "train_step/drop_rate/layer_1"))[step]
        assert sum(dropped) / sum(asked) == pytest.approx(rate)
        # 16 slots each for 128 tokens: half are dropped at least, and none of the first 16 tokens.
        assert sum(dropped) >= TOKENS_PER_STEP // 2
        assert dropped[:2] == [0, 0]
        assert sum(dropped[:8]) < sum(dropped[8:])
    for arm in ("base", "uniform", "skewed"):
        assert {int(r["dropped"]) for r in rows(runs[arm], "drop_by_position.csv")} == {0}


def test_tokens_and_flops_of_experts_add_up_to_those_of_the_ranks(runs: dict[str, Path]) -> None:
    for arm, path in runs.items():
        manifest = program.read(path / "manifest.json")
        sums: dict[tuple[str, str, str], list[int]] = {}
        for row in rows(path, "compute_balance.csv"):
            key = (row["step"], row["stage"], row["unit"])
            tokens, flops = sums.setdefault(key, [0, 0])
            sums[key] = [tokens + int(row["tokens"]), flops + int(row["flops"])]
        for (step, stage, unit), found in sums.items():
            assert found == sums[step, stage, "expert"], (arm, unit)
        # The ledger's figure is counted by torch on a pass of its own.
        tokens, flops = sums["1", "train_step", "expert"]
        assert flops / tokens == pytest.approx(manifest["ledger"]["expert_flops_per_token"])
        if arm != "switch":
            assert tokens == TOKENS_PER_STEP


def test_capacity_padding_is_what_the_usage_leaves(runs: dict[str, Path]) -> None:
    for stage in ("train_step", "final_pass"):
        usage = last(runs["switch"], f"{stage}/capacity_usage/layer_1")
        assert last(runs["switch"], f"{stage}/capacity_padding/layer_1") == pytest.approx(1 - usage)


def test_the_phases_of_a_logged_step_add_up(runs: dict[str, Path]) -> None:
    for arm, path in runs.items():
        found = {phase: program.series(path, f"train_time/{phase}") for phase in PHASES}
        shares = {phase: program.series(path, f"train_time/share_{phase}") for phase in PHASES}
        assert all([step for step, _ in series] == [1, 2, 4] for series in (*found.values(), *shares.values()))
        for i in range(3):
            assert sum(series[i][1] for series in shares.values()) == pytest.approx(1)
            # Two ranks start a step at slightly different times, one rank waits for nobody.
            assert all(series[i][1] >= 0 for phase, series in found.items() if arm != "two_ranks" or phase == "waiting")
            for phase in ("router", "dispatch", "experts", "combine", "other_forward", "backward_and_optimizer"):
                assert found[phase][i][1] > 0, (arm, phase)
        assert all((value > 0) == (arm in ("base", "two_ranks")) for _, value in found["assignment"])
        assert all((value > 0) == (arm == "two_ranks") for _, value in found["waiting"])
        idle = program.series(path, "train_time/idle_fraction")
        assert all(0 <= value < (0.5 if arm == "two_ranks" else 1e-12) for _, value in idle)
        # The clock's window of the first step is that step alone. Of two ranks it shows the first one's.
        total = sum(series[0][1] for series in found.values())
        rough = 1e-9 if arm != "two_ranks" else 0.5
        assert total == pytest.approx(program.series(path, "train/step_time")[0][1], rel=rough)


@pytest.mark.parametrize(("arm", "causal"), [("base", "in evaluation"), ("uniform", "yes")])
def test_the_hyperparameters_in_tensorboard_say_which_arm_is_causal(
    runs: dict[str, Path], arm: str, causal: str
) -> None:
    events = EventAccumulator(str(runs[arm] / "tensorboard")).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["causal"].string_value == causal
    assert shown["num_experts"].number_value == EXPERTS
