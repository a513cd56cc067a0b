"""Runs of the real program on models of transformers."""

from pathlib import Path

import program
import pytest
import torch
from huggingface.tiny_models import by_hand

from lightning_base.analysis.command import main as analysis
from lightning_base.export import load
from lightning_base.export import main as export
from lightning_base.results.fairness import compare
from lightning_base.results.read import read_counts
from lightning_base.results.verify import sound_runs

LAYER = "model.layers.1.mlp"


@pytest.fixture(scope="module")
def arguments(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a run that starts from the weights in a local folder."""
    folder = tmp_path_factory.mktemp("llama")
    by_hand("llama", vocab_size=512).save_pretrained(folder)
    model = ["model=huggingface", f"model.config={folder}", "model.split_width=false", "module.warmup_steps=0"]
    return [*small_corpus, *model, "trainer.max_steps=3", "trainer.checkpoint_every_n_steps=1"]


@pytest.fixture(scope="module")
def sweep(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    done = program.train("-m", *arguments, "router=top_k,dense", "trainer.record_plans=true", f"runs_dir={runs}")
    assert done.returncode == 0, done.stderr
    return runs / "debug"


def job(sweep: Path, router: str) -> Path:
    return next(path for path in sweep.iterdir() if f"router={router}" in path.name)


def test_arms_of_a_loaded_model_stand_in_one_table(sweep: Path) -> None:
    (comparison,) = compare(sound_runs(sweep)[0])
    assert {arm.router for arm in comparison.arms} == {"TopK", "Dense"}
    manifests = [program.read(job(sweep, router) / "manifest.json") for router in ("top_k", "dense")]
    assert len({manifest["initial_weights_fingerprint"] for manifest in manifests}) == 1
    assert len({manifest["batch_fingerprint"] for manifest in manifests}) == 1
    for manifest in manifests:
        assert manifest["architecture"]["config"]["model_type"] == "llama"
        assert "transformers" in manifest["packages"]
        assert manifest["steps"] == 3
    sparse, dense = (manifest["ledger"] for manifest in manifests)
    # Width 32, three matrices of 32 x 64 in a feed-forward layer: 2 FLOPs an entry forward, twice as many backward.
    assert dense["expert_flops_per_token"] == 6 * 3 * 32 * 64
    assert sparse["expert_flops_per_token"] == 2 * dense["expert_flops_per_token"]
    assert sparse["parameters"] - dense["parameters"] == 7 * 3 * 32 * 64 + 8 * 32


def test_the_first_loss_of_copies_is_that_of_the_dense_arm(sweep: Path) -> None:
    sparse, dense = (program.series(job(sweep, router), "train/loss") for router in ("top_k", "dense"))
    assert [step for step, _ in sparse] == [1, 2, 3]
    assert sparse[0][1] == pytest.approx(dense[0][1], abs=2e-6)
    assert sparse[2][1] != pytest.approx(dense[2][1], abs=2e-6)
    assert dense[2][1] < dense[0][1]


def test_loads_are_recorded_under_the_name_of_the_module(sweep: Path) -> None:
    assert program.series(job(sweep, "top_k"), f"train_step/max_vio/demand/{LAYER}")
    assert f",{LAYER}," in (job(sweep, "top_k") / "expert_load.csv").read_text()


def test_a_recorded_run_of_their_model_can_be_replayed(sweep: Path, arguments: list[str], tmp_path: Path) -> None:
    source = job(sweep, "top_k")
    done = program.train(*arguments, "router=replay", f'router.source="{source}"', f"runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    replay = program.only_job(tmp_path)
    counts = [read_counts(path / "expert_load.csv") for path in (source, replay)]
    for stage, by_layer in counts[0].items():
        assert counts[1][stage][LAYER].demand.tolist() == by_layer[LAYER].demand.tolist(), stage
    assert counts[0]["train_step"][LAYER].steps.tolist() == [1, 2, 3]
    # The gates of the first step were those of the weights that both start with; later ones were learnt by the source.
    losses = [program.series(path, "train/loss") for path in (source, replay)]
    assert losses[1][0][1] == pytest.approx(losses[0][0][1], abs=2e-6)
    assert losses[1][2][1] != losses[0][2][1]


def test_a_run_that_goes_on_ends_with_the_same_weights_and_they_can_be_exported(
    sweep: Path, arguments: list[str], tmp_path: Path
) -> None:
    whole = job(sweep, "top_k")
    start = whole / "checkpoints" / "step_2.ckpt"
    done = program.train(*arguments, "router=top_k", f"resume='{start}'", f"runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    again = program.only_job(tmp_path)
    states = [program.state(path / "checkpoints" / "step_3.ckpt")["state_dict"] for path in (whole, again)]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert export([str(again), "--output", str(tmp_path / "out")]) == 0
    exported = load(tmp_path / "out").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in states[0].items())


def test_a_model_without_the_named_layers_is_refused_before_anything_is_spent(
    small_corpus: list[str], tmp_path: Path
) -> None:
    given = ["model=huggingface", "model.layers=model.layers.*.mlp", f"runs_dir={tmp_path}/runs"]
    done = program.train(*small_corpus, *given)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: model.layers=model.layers.*.mlp names no module of GPT2LMHeadModel")
    assert not list(tmp_path.glob("runs/*/*/status.json"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["ddp", "expert_parallel", "fsdp"])
def test_two_ranks_learn_what_one_does(sweep: Path, arguments: list[str], strategy: str, tmp_path: Path) -> None:
    more = [f"strategy={strategy}", "trainer.devices=2", f"runs_dir={tmp_path}"]
    done = program.train(*arguments, "router=top_k", *more)
    assert done.returncode == 0, done.stderr
    one, two = job(sweep, "top_k"), program.only_job(tmp_path)
    for name in ("train/loss", "final/loss"):
        alone, together = (dict(program.series(path, name)) for path in (one, two))
        assert alone.keys() == together.keys()
        assert list(together.values()) == pytest.approx(list(alone.values()), abs=1e-4)


@pytest.mark.exhaustive
def test_what_experts_attract_is_found_in_their_model_too(sweep: Path) -> None:
    assert analysis([str(job(sweep, "top_k"))]) == 0
    rows = (job(sweep, "top_k") / "analysis" / "summary.csv").read_text().splitlines()
    assert any(LAYER in row for row in rows[1:])
