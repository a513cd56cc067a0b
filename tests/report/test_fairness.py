"""Only runs that agree in everything but the router stand in one table, and a manifest that was altered in none."""

import json
from pathlib import Path
from typing import Any

import pytest
from hand_made_runs import edit, write_json, write_run

from lightning_base.report.document import build

OTHER = {
    "corpus_fingerprint": "d" * 64,
    "batch_fingerprint": "d" * 32,
    "initial_weights_fingerprint": "d" * 64,
    "git_commit": "b" * 40,
    "device": "another, 1 threads",
    "python": "3.12.0",
    "packages>torch": "2.14.0",
}


@pytest.mark.parametrize("field", OTHER)
def test_a_run_with_another_identity_gets_a_table_of_its_own_and_the_field_is_named(
    experiment: Path, field: str
) -> None:
    write_run(experiment / "router=dense", "Dense", 4.8)
    edit(experiment / "router=switch" / "manifest.json", field, OTHER[field])
    first, apart = build(experiment).sections
    assert first.labels == ["base", "Dense"]
    assert apart.labels == ["switch"]
    assert [line.split(":")[0] for line in apart.apart] == [field.replace(">", ".")]


@pytest.mark.parametrize(
    ("key", "value"), [("data.routing_group", 2), ("module.learning_rate", 0.02), ("model.width", 16)]
)
def test_another_configuration_outside_the_router_is_named_with_both_values(
    experiment: Path, key: str, value: Any
) -> None:
    before = {"data.routing_group": 1, "module.learning_rate": 0.01, "model.width": 8}[key]
    write_run(experiment / "other", "Dense", 4.8, changes={key: value})
    _, apart = build(experiment).sections
    assert apart.title == f"{key} = {value}"
    assert apart.apart == [f"{key}: {value} here, {before} in the first table"]


def test_a_sweep_over_steps_makes_a_table_for_each_number_of_steps(tmp_path: Path) -> None:
    for steps in (4, 8):
        for router in ("BASE", "Switch"):
            write_run(tmp_path / f"{router}{steps}", router, changes={"trainer.max_steps": steps})
    sections = build(tmp_path).sections
    assert [section.title for section in sections] == ["trainer.max_steps = 4", "trainer.max_steps = 8"]
    assert [len(section.labels) for section in sections] == [2, 2]


def test_loss_coefficients_and_names_of_runs_do_not_separate(experiment: Path) -> None:
    changes = {"module.loss_coefficients": {"load_balancing_loss": 0.1}, "name": "another", "runs_dir": "elsewhere"}
    ledger = {"loss_coefficients": {"load_balancing_loss": 0.1}}
    write_run(experiment / "more_balance", "Switch", 4.6, changes=changes, ledger=ledger)
    (section,) = build(experiment).sections
    assert len(section.labels) == len(set(section.labels)) == 3


def test_callbacks_that_look_on_do_not_separate_and_others_do(experiment: Path) -> None:
    ours = {"callbacks": {"plans": {"_target_": "lightning_base.callbacks.recording.PlanRecorder", "when": True}}}
    write_run(experiment / "recorded", "TopK", 4.6, changes=ours)
    (section,) = build(experiment).sections
    assert len(section.labels) == 3
    write_run(experiment / "watched", "Hash", 4.6, changes={"callbacks": {"mine": {"_target_": "theirs.Stops"}}})
    assert len(build(experiment).sections) == 2


def test_another_world_size_stays_in_the_table_and_the_speed_is_labelled(experiment: Path) -> None:
    changes = {"trainer.devices": 2, "strategy.name": "ddp"}
    write_run(
        experiment / "two", "Dense", 4.8, changes=changes, manifest={"world_size": 2, "device": "x86_64, 2 threads"}
    )
    (section,) = build(experiment).sections
    (caution,) = section.cautions
    assert caution.startswith("Speeds are not comparable")
    assert "world_size=2" in caution


def test_arms_with_other_seeds_are_not_compared(experiment: Path) -> None:
    write_run(experiment / "seed_2", "Dense", 4.8, seed=2)
    _, apart = build(experiment).sections
    assert "seed: 2 here, 1 in the first table" in apart.apart


@pytest.mark.parametrize(
    ("name", "words"), [("flops_per_token", "FLOPs per token"), ("active_parameters", "active parameters")]
)
def test_unequal_cost_is_labelled_with_the_numbers(experiment: Path, name: str, words: str) -> None:
    value = {"flops_per_token": 6300.0, "active_parameters": 1050}[name]
    write_run(experiment / "dear", "TopK", 4.4, ledger={name: value})
    (section,) = build(experiment).sections
    (caution,) = section.cautions
    assert words in caution
    assert "5.0 %" in caution
    assert {"flops_per_token": "TopK 6.300 k", "active_parameters": "TopK 1.050 k"}[name] in caution


def test_a_cost_within_one_percent_is_equal(experiment: Path) -> None:
    write_run(experiment / "near", "TopK", 4.4, ledger={"flops_per_token": 6050.0})
    (section,) = build(experiment).sections
    assert section.cautions == []


def test_uncommitted_code_is_labelled(tmp_path: Path) -> None:
    for router in ("BASE", "Switch"):
        write_run(tmp_path / router, router, manifest={"git_commit": f"{'a' * 40}-dirty"})
    (section,) = build(tmp_path).sections
    assert "uncommitted" in section.cautions[0]


def program(version: str, digit: str) -> dict[str, Any]:
    """What the manifest of a run says of the package that trained it."""
    return {"program": {"lightning_base": {"version": version, "source_sha256": digit * 64}}}


@pytest.mark.parametrize("commit", [None, f"{'a' * 40}-dirty"])
def test_code_of_one_hash_is_the_same_code_whatever_is_known_of_its_commit(commit: str | None, tmp_path: Path) -> None:
    for router in ("BASE", "Switch"):
        write_run(tmp_path / router, router, manifest={"git_commit": commit, "sources": program("0.1.0", "a")})
    (section,) = build(tmp_path).sections
    assert section.cautions == []
    assert section.made_with["code"] == f"lightning_base 0.1.0 ({'a' * 12}…)"
    # The program may have been installed for one of them.
    write_run(tmp_path / "clone", "Dense", manifest={"git_commit": "b" * 40, "sources": program("0.1.0", "a")})
    (section,) = build(tmp_path).sections
    assert section.labels == ["BASE", "Switch", "Dense"]
    # A run that was made before this was written has no hash, and cannot be told to be of the same code.
    write_run(tmp_path / "older", "TopK", manifest={"git_commit": commit})
    _, older = build(tmp_path).sections
    assert older.labels == ["TopK"]
    assert older.cautions[0].endswith("that all arms ran the same code is not certain.")


def test_another_version_without_a_commit_is_another_table(tmp_path: Path) -> None:
    for router, version, digit in (("BASE", "0.1.0", "a"), ("Switch", "0.2.0", "b")):
        write_run(tmp_path / router, router, manifest={"git_commit": None, "sources": program(version, digit)})
    _, apart = build(tmp_path).sections
    assert apart.apart == [
        f"sources.program.lightning_base.source_sha256: {'b' * 12}… here, {'a' * 12}… in the first table",
        "sources.program.lightning_base.version: 0.2.0 here, 0.1.0 in the first table",
    ]


def plugin(digit: str) -> dict[str, Any]:
    """What the manifest of a run with a router of another package has of it."""
    return {"sources": {"router": {"their_package": {"version": "1.2", "source_sha256": digit * 64}}}}


def test_a_plugin_that_was_changed_between_seeds_is_two_arms(tmp_path: Path) -> None:
    for seed, digit in ((1, "a"), (2, "b"), (3, "b")):
        write_run(tmp_path / f"base{seed}", "BASE", seed=seed)
        write_run(tmp_path / f"theirs{seed}", "Theirs", 4.5, seed=seed, manifest=plugin(digit))
    (section,) = build(tmp_path).sections
    old, new = (f"Theirs (source_sha256={digit * 12}…)" for digit in "ab")
    assert section.labels == ["BASE", old, new]
    assert [arm.seeds for arm in section.comparison.arms] == [(1, 2, 3), (1,), (2, 3)]
    assert section.made_with["code"] == f"their_package 1.2 ({'a' * 12}…) and their_package 1.2 ({'b' * 12}…)"
    assert any(
        caution == f"A plugin was changed between runs of one router, which are arms of their own: {old} is of "
        f"their_package 1.2 ({'a' * 12}…), {new} of their_package 1.2 ({'b' * 12}…)."
        for caution in section.cautions
    )


def test_a_changed_plugin_without_other_arms_is_named_between_two_tables(tmp_path: Path) -> None:
    for seed, digit in ((1, "a"), (2, "b")):
        write_run(tmp_path / str(seed), "Theirs", seed=seed, manifest=plugin(digit))
    _, apart = build(tmp_path).sections
    assert apart.apart[-1] == (
        f"Theirs is of their_package 1.2 ({'b' * 12}…), Theirs of their_package 1.2 ({'a' * 12}…)"
    )


def test_steps_of_an_earlier_source_keep_a_run_out_of_the_table(experiment: Path) -> None:
    earlier = {"earlier_sources": [plugin("a")["sources"]]}
    write_run(experiment / "other", "Theirs", 4.8, manifest={**plugin("b"), **earlier})
    _, apart = build(experiment).sections
    assert apart.apart == [f"earlier_sources: 1.2, {'a' * 12}… here, nothing in the first table"]


TAMPERED = {
    "result>final/loss": 4.0,
    "result>final/perplexity": 50.0,
    "result>final/bits_per_byte": 1.0,
    "steps": 8,
    "sequences": 80,
    "tokens": 63,
    "assignments": 128,
    "assignments_dropped": 0,
    "training_seconds": 1.0,
    "seed": 2,
    "config>module>learning_rate": 0.5,
    "config>router>capacity_factor": 2.0,
    "ledger>router": "BASE",
    "ledger>num_experts": 8,
    "ledger>top_k": 2,
    "ledger>capacity_factor": 2.0,
    "ledger>active_parameters": 5000,
    "corpus_fingerprint": "c" * 63,
    "batch_fingerprint": "Z" * 32,
    "initial_weights_fingerprint": None,
    "ledger>flops_per_token": None,
}


@pytest.mark.parametrize("field", TAMPERED)
def test_a_manifest_that_the_other_files_contradict_is_refused_and_the_field_named(
    experiment: Path, field: str
) -> None:
    edit(experiment / "router=switch" / "manifest.json", field, TAMPERED[field])
    document = build(experiment)
    assert [section.labels for section in document.sections] == [["base"]]
    (refused,) = document.left_out
    assert refused.state == "refused"
    assert field.rpartition(">")[2] in refused.reason


def test_a_loss_altered_in_the_metrics_is_found_too(experiment: Path) -> None:
    path = experiment / "router=switch" / "metrics.csv"
    path.write_text(path.read_text().replace("final/loss,4.5", "final/loss,4.0"))
    (refused,) = build(experiment).left_out
    assert "result.final/loss is 4.5 in manifest.json and 4.0 in metrics.csv" in refused.reason


def test_counts_altered_in_the_load_file_are_found(experiment: Path) -> None:
    path = experiment / "router=switch" / "expert_load.csv"
    path.write_text(path.read_text().replace("final_pass,layer_1,0,20,20", "final_pass,layer_1,0,10,10"))
    (refused,) = build(experiment).left_out
    assert "max_vio" in refused.reason


@pytest.mark.parametrize("name", ["manifest.json", "metrics.csv", "expert_load.csv", ".hydra/config.yaml"])
@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_a_run_with_a_missing_or_broken_file_is_refused_and_the_file_named(
    experiment: Path, name: str, damage: str
) -> None:
    path = experiment / "router=switch" / name
    path.unlink() if damage == "missing" else path.write_text("{[")
    (refused,) = build(experiment).left_out
    assert Path(name).name in refused.reason


def test_jobs_that_did_not_finish_are_listed_with_state_and_error(experiment: Path) -> None:
    failed = {"state": "failed", "error": "ValueError: too hot", "traceback": "line 1"}
    (experiment / "router=dense").mkdir()
    write_json(experiment / "router=dense" / "status.json", failed)
    jobs = json.loads((experiment / "sweep.json").read_text())["jobs"]
    write_json(experiment / "sweep.json", {"jobs": {**jobs, "router=dense": "dense", "router=top_k": "top_k"}})
    listed = {job.label: (job.state, job.reason) for job in build(experiment).left_out}
    assert listed["dense"] == ("failed", "ValueError: too hot")
    assert listed["top_k"][0] == "not started"


def test_fewer_assignments_than_top_k_need_a_router_that_asks_for_fewer(tmp_path: Path) -> None:
    # 64 tokens that ask for one expert each, in a ledger that says two.
    write_run(tmp_path / "a", "TopK", ledger={"top_k": 2})
    write_run(tmp_path / "b", "GShard", ledger={"top_k": 2, "asks_for_fewer": True})
    document = build(tmp_path)
    assert [run.router for section in document.sections for run in section.comparison.arms] == ["GShard"]
    (refused,) = document.left_out
    assert "assignments is 64 in manifest.json, not tokens x top_k x layers = 128" in refused.reason
