"""The same arms on one rank, on two, and with accumulation: same batches, same losses up to floating point."""

from collections.abc import Sequence
from pathlib import Path

import program
import pytest

ARMS = ("dense", "base", "switch", "top_k")
COMMON = (
    "trainer.max_steps=6",
    "trainer.log_every_n_steps=1",
    "trainer.validate_every_n_steps=3",
)
SETTINGS = {
    "one_rank": (),
    "accumulation": ("trainer.accumulate_grad_batches=2",),
    "two_ranks": ("strategy=ddp", "trainer.devices=2"),
    "expert_parallel": ("strategy=expert_parallel", "trainer.devices=2"),
    "fsdp": ("strategy=expert_parallel", "strategy.shared=fsdp", "trainer.devices=2"),
}
# In the short form, of each setting.
# A router that balances a group and remembers, and one that drops and has a loss.
SHORT = {"one_rank": ARMS, "accumulation": ("switch",), "two_ranks": ("base", "switch")}


def sweep(corpus: list[str], folder: Path, setting: str, arms: Sequence[str]) -> dict[str, Path]:
    """Folders by arm of one real multirun."""
    where = (f"runs_dir={folder}", f"name={setting}")
    done = program.train("-m", *corpus, f"router={','.join(arms)}", *COMMON, *SETTINGS[setting], *where)
    assert done.returncode == 0, done.stderr
    folders = program.jobs(folder, setting)
    assert len(folders) == len(arms), "one directory per job, whatever the ranks"
    return {arm: next(path for name, path in folders.items() if f"router={arm}," in name) for arm in arms}


@pytest.fixture(scope="module")
def runs(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Folders by setting and arm; on one rank of all arms."""
    folder = tmp_path_factory.mktemp("runs")
    return {setting: sweep(small_corpus, folder, setting, arms) for setting, arms in SHORT.items()}


@pytest.fixture(scope="module")
def other_runs(
    runs: dict[str, dict[str, Path]], small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Path]]:
    """The same of the arms that ``runs`` has on one rank alone."""
    folder, found = tmp_path_factory.mktemp("other_runs"), {"one_rank": runs["one_rank"]}
    for setting in SETTINGS:
        if arms := [arm for arm in ARMS if arm not in SHORT.get(setting, ())]:
            found[setting] = sweep(small_corpus, folder, setting, arms)
    return found


def cases() -> list[object]:
    """Every arm in every setting, with the fixture that has it."""
    short = [(arm, setting, "runs") for setting, arms in SHORT.items() for arm in arms if setting != "one_rank"]
    rest = [(arm, setting) for setting in SETTINGS for arm in ARMS if setting != "one_rank"]
    long = [(*case, "other_runs") for case in rest if (*case, "runs") not in short]
    return [*short, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in long)]


@pytest.mark.parametrize(("arm", "setting", "where"), cases())
def test_losses_and_batches_are_those_of_one_rank(
    arm: str, setting: str, where: str, request: pytest.FixtureRequest
) -> None:
    runs = request.getfixturevalue(where)
    alone, other = runs["one_rank"][arm], runs[setting][arm]
    manifests = [program.read(path / "manifest.json") for path in (alone, other)]
    fingerprints = ("batch", "corpus", "initial_weights", "initial_expert_weights")
    for field in (*(f"{what}_fingerprint" for what in fingerprints), "sequences", "tokens", "ledger"):
        assert manifests[0][field] == manifests[1][field], field
    # Sums in another order differ in the last digits; a token at a tie may then go to another expert, which a gradient
    # norm shows more than a loss.
    for name, tolerance in (
        ("train/loss", 2e-5),
        ("validation/loss", 2e-5),
        ("final/loss", 2e-5),
        ("train/gradient_norm", 5e-4),
    ):
        expected, found = program.series(alone, name), program.series(other, name)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=tolerance), name
    # Counts are whole numbers: they agree exactly, or some token was routed in another group.
    for name in ("train_step/max_vio/demand/mean", "train_group/max_vio/load/mean"):
        assert program.series(other, name)[0] == pytest.approx(program.series(alone, name)[0], abs=1e-12)


def test_all_arms_share_data_weights_and_steps(runs: dict[str, dict[str, Path]]) -> None:
    manifests = [program.read(path / "manifest.json") for path in runs["one_rank"].values()]
    for field in ("batch_fingerprint", "corpus_fingerprint", "initial_weights_fingerprint", "steps", "tokens"):
        assert len({manifest[field] for manifest in manifests}) == 1, field
    assert manifests[0]["steps"] == 6
    assert manifests[0]["tokens"] == 6 * 16 * 32


def test_every_rank_read_the_composed_configuration_of_its_own_job(runs: dict[str, dict[str, Path]]) -> None:
    for arm, path in runs["two_ranks"].items():
        manifest = program.read(path / "manifest.json")
        assert manifest["world_size"] == 2
        assert manifest["config"]["router"]["_target_"].lower().endswith(arm.replace("_", ""))


def test_the_arms_cost_the_same_per_token_up_to_the_router(runs: dict[str, dict[str, Path]]) -> None:
    ledgers = {arm: program.read(path / "manifest.json")["ledger"] for arm, path in runs["one_rank"].items()}
    # D = 32, H = 64, V = 512, L = 32, two blocks, one of them sparse. A matrix product of a token with an M x N matrix
    # costs 2 M N, and twice that again in the backward pass. Per token and block: attention matrices 4 D^2, the two
    # products with keys and values 2 L D, feed-forward 2 D H. The attention products count in full: the plain kernel
    # computes the masked half too. The logits: D V.
    block = 4 * 32**2 + 2 * 32 * 32 + 2 * 32 * 64
    dense = 6 * (2 * block + 32 * 512)
    router = 6 * 32 * 8
    assert ledgers["dense"]["flops_per_token"] == pytest.approx(dense)
    assert ledgers["switch"]["flops_per_token"] == pytest.approx(dense + router)
    assert ledgers["top_k"]["flops_per_token"] == pytest.approx(dense + router)
    assert ledgers["base"]["flops_per_token"] == pytest.approx(dense + router)
    assert {ledger["expert_flops_per_token"] for ledger in ledgers.values()} == {6.0 * 2 * 32 * 64}


def test_base_is_exactly_balanced_in_training(runs: dict[str, dict[str, Path]]) -> None:
    for setting in ("one_rank", "two_ranks"):
        values = program.series(runs[setting]["base"], "train_group/max_vio/load/max")
        assert len(values) == 6
        assert all(value == 0.0 for _, value in values)
