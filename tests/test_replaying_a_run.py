"""The real program records runs and replays them, on one rank and on two."""

from pathlib import Path

import program
import pytest

from lightning_base.report.document import build
from lightning_base.results.read import read_counts

STEPS = ("trainer.max_steps=6", "trainer.log_every_n_steps=1", "trainer.validate_every_n_steps=3")
STEPS += ("module.learning_rate=0.03",)
RECORD = "trainer.record_plans=true"
TWO_RANKS = ("strategy=ddp", "trainer.devices=2")


@pytest.fixture(scope="module")
def runs(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources and replays of them, by what they are."""
    folder = tmp_path_factory.mktemp("replays")

    def run(name: str, *arguments: str) -> list[Path]:
        done = program.train(*small_corpus, *STEPS, RECORD, *arguments, f"runs_dir={folder}", f"name={name}")
        assert done.returncode == 0, done.stderr
        return list(program.jobs(folder, name).values())

    def replay(name: str, source: Path, *arguments: str) -> list[Path]:
        return run(name, "router=replay", f'router.source="{source}"', *arguments)

    found: dict[str, Path] = {}
    (found["base"],) = run("base", "router=base", *TWO_RANKS)
    (found["gshard"],) = run("gshard", "router=gshard", "router.capacity_factor=0.5")
    both = replay("of_base", found["base"], "-m", "router.weight=recorded,learned", "trainer.accumulate_grad_batches=2")
    for path in both:
        found[program.read(path / "manifest.json")["config"]["router"]["weight"]] = path
    (found["replay of gshard"],) = replay("of_gshard", found["gshard"])
    (found["replay of recorded"],) = replay("of_replay", found["recorded"], *TWO_RANKS)
    return found


def losses(directory: Path) -> list[float]:
    names = ("train/loss", "validation/loss", "final/loss", "final_balanced/loss")
    return [value for name in names for _, value in program.series(directory, name)]


@pytest.mark.parametrize(
    ("one", "other"), [("base", "recorded"), ("base", "learned"), ("gshard", "replay of gshard")], ids=lambda name: name
)
def test_a_replay_has_the_loads_of_its_source_at_every_step(runs: dict[str, Path], one: str, other: str) -> None:
    counts = [read_counts(runs[name] / "expert_load.csv") for name in (one, other)]
    assert counts[0].keys() == counts[1].keys()
    for stage, by_layer in counts[0].items():
        for layer, expected in by_layer.items():
            found = counts[1][stage][layer]
            assert found.steps.tolist() == expected.steps.tolist(), stage
            assert found.demand.tolist() == expected.demand.tolist(), stage
            assert found.load.tolist() == expected.load.tolist(), stage
    assert counts[0]["train_step"]["layer_1"].steps.tolist() == [1, 2, 3, 4, 5, 6]
    manifests = [program.read(runs[name] / "manifest.json") for name in (one, other)]
    for field in ("batch_fingerprint", "tokens", "assignments", "assignments_dropped"):
        assert manifests[0][field] == manifests[1][field], field


def test_a_replay_of_dropped_tokens_drops_them(runs: dict[str, Path]) -> None:
    assert program.read(runs["replay of gshard"] / "manifest.json")["assignments_dropped"] > 0


def test_base_replayed_with_centroids_that_learn_is_base(runs: dict[str, Path]) -> None:
    # Ranks and accumulation are other ones too; the same floats in the same order are added nevertheless.
    assert losses(runs["learned"]) == pytest.approx(losses(runs["base"]), rel=1e-9)
    # 6 steps, 2 validations, and a final pass in both modes.
    assert len(losses(runs["learned"])) == 10


def test_recorded_weights_alone_are_another_training(runs: dict[str, Path]) -> None:
    # Every expert still adds nothing at the first step, whatever the gate; no gradient through the gate shows later.
    assert losses(runs["recorded"])[0] == pytest.approx(losses(runs["base"])[0], rel=1e-6)
    # Within 6 steps by a few parts in 100,000, which is far above what the same training repeated differs by (above).
    assert losses(runs["recorded"])[5] != pytest.approx(losses(runs["base"])[5], rel=2e-5)


def test_a_replay_of_a_replay_on_other_ranks_has_the_same_losses(runs: dict[str, Path]) -> None:
    assert losses(runs["replay of recorded"]) == pytest.approx(losses(runs["recorded"]), rel=1e-5)


def test_sources_and_replays_stand_in_one_table(runs: dict[str, Path]) -> None:
    document = build(*sorted({path.parent for path in runs.values()}))
    assert document.left_out == []
    (section,) = document.sections
    paths = [arm.first.path for arm in section.comparison.arms]
    labels = {name: section.labels[paths.index(path)] for name, path in runs.items()}
    assert (labels["base"], labels["gshard"]) == ("BASE", "GShard")
    for name, source in (("recorded", "base"), ("learned", "base"), ("replay of gshard", "gshard")):
        assert labels[name].startswith(f"Replay of {source}/"), labels
    assert len(set(labels.values())) == 6
    marks = {row[0].removeprefix(label) for label, row in zip(section.labels, section.tables[0].rows, strict=True)}
    assert marks == {"†", "†‡"}, "BASE's and GShard's"


def test_a_replay_knows_what_its_source_is(runs: dict[str, Path]) -> None:
    manifest = program.read(runs["recorded"] / "manifest.json")
    assert manifest["ledger"]["num_experts"] == 8
    assert manifest["ledger"]["causal_in_training"] is False
    assert manifest["ledger"]["evaluation_modes"] == {"greedy": True, "balanced": False}
    base = program.read(runs["base"] / "manifest.json")
    # The same experts, and with recorded gates no router: 2 * 3 products of D = 32 and E = 8 less per token.
    difference = base["ledger"]["flops_per_token"] - manifest["ledger"]["flops_per_token"]
    assert difference == pytest.approx(6 * 32 * 8)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["seed=2"], "seed=2 is not the 1 of router.source="),
        (["data.routing_group=8"], "data.routing_group=8 is not the 4 of router.source="),
        (["trainer.max_steps=7"], "trainer.max_steps=7 is not the 6 of router.source="),
        (["router.num_experts=4"], "router.num_experts=4 is not the 8 of router.source="),
    ],
    ids=["seed", "groups", "steps", "experts"],
)
def test_what_cannot_be_replayed_is_one_sentence_and_nothing_is_written(
    overrides: list[str], sentence: str, runs: dict[str, Path], small_corpus: list[str], tmp_path: Path
) -> None:
    source = f'router.source="{runs["base"]}"'
    done = program.train(*small_corpus, *STEPS, "router=replay", source, *overrides, f"runs_dir={tmp_path}/runs")
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("runs/*/*/status.json"))


def test_a_replay_without_a_source_says_so(tmp_path: Path) -> None:
    done = program.train("debug=fast", "router=replay", f"runs_dir={tmp_path}/runs")
    assert done.returncode == 2
    assert "router.source is missing: give it, as router.source=" in done.stderr
