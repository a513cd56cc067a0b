"""The same arms on one rank, on two, and with accumulation: same batches, same losses up to floating point."""

from pathlib import Path

import program
import pytest

ARMS = ("dense", "base", "switch", "top_k")
COMMON = (
    "router=dense,base,switch,top_k",
    "trainer.max_steps=6",
    "trainer.log_every_n_steps=1",
    "trainer.validate_every_n_steps=3",
)
SETTINGS = {
    "one_rank": (),
    "accumulation": ("trainer.accumulate_grad_batches=2",),
    "two_ranks": ("strategy=ddp", "trainer.devices=2"),
}


@pytest.fixture(scope="module")
def runs(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Folders by setting and arm; one real multirun of four arms per setting."""
    folder = tmp_path_factory.mktemp("runs")
    found: dict[str, dict[str, Path]] = {}
    for setting, overrides in SETTINGS.items():
        done = program.train("-m", *small_corpus, *COMMON, *overrides, f"runs_dir={folder}", f"name={setting}")
        assert done.returncode == 0, done.stderr
        folders = program.jobs(folder, setting)
        found[setting] = {arm: next(path for name, path in folders.items() if f"router={arm}," in name) for arm in ARMS}
        assert len(folders) == len(ARMS), "one directory per job, whatever the ranks"
    return found


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting != "one_rank"])
@pytest.mark.parametrize("arm", ARMS)
def test_losses_and_batches_are_those_of_one_rank(runs: dict[str, dict[str, Path]], arm: str, setting: str) -> None:
    alone, other = runs["one_rank"][arm], runs[setting][arm]
    manifests = [program.read(path / "manifest.json") for path in (alone, other)]
    for field in ("batch_fingerprint", "corpus_fingerprint", "initial_weights_fingerprint", "sequences", "tokens"):
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
    manifests = [program.read(path / "manifest.json") for path in runs["two_ranks"].values()]
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
    for setting in SETTINGS:
        values = program.series(runs[setting]["base"], "train_group/max_vio/load/max")
        assert len(values) == 6
        assert all(value == 0.0 for _, value in values)
