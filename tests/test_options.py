"""Options of a run that should change its cost but not its numbers, or that only have to work, in the real program."""

import dataclasses
import json
from pathlib import Path

import program
import pytest

from lightning_base.benchmark.bare import configuration
from lightning_base.instantiation import ConfigError
from lightning_base.program.build import build_module
from lightning_base.program.read_config import fit_schedule

STEPS = ("trainer.max_steps=4", "trainer.log_every_n_steps=1", "trainer.validate_every_n_steps=4")
# Documents of their own length: padding in training and evaluation, and nobody sees another document.
PADDED = ("data.packing=documents", "data.attend_across_documents=false")


def losses(directory: Path, *names: str) -> list[float]:
    return [value for name in names for _, value in program.series(directory, name)]


@pytest.fixture(scope="module")
def padded(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """BASE and top-k on padded documents: plain, and one of them on two ranks or with activation checkpointing."""
    folder = tmp_path_factory.mktemp("padded")
    # Paragraphs of the corpus, one document each: most are shorter than a sequence.
    (corpus,) = (option for option in small_corpus if option.startswith("data.corpus.files="))
    paragraphs = [
        paragraph
        for path in sorted(Path(corpus.partition("=")[2]).parent.glob("*.txt"))
        for paragraph in path.read_text().split("\n\n")
    ]
    rows = [json.dumps({"text": paragraph}) for paragraph in paragraphs if paragraph.strip()]
    (folder / "paragraphs.jsonl").write_text("\n".join(rows))
    short = f"data.corpus.files={folder}/paragraphs.jsonl"
    settings = {
        "plain": ("router=base,top_k",),
        "two_ranks": ("router=top_k", "strategy=ddp", "trainer.devices=2"),
        "checkpointing": ("router=base", "module.activation_checkpointing=true", "trainer.accumulate_grad_batches=2"),
    }
    found = {}
    for name, overrides in settings.items():
        done = program.train(
            "-m",
            *small_corpus,
            *STEPS,
            *PADDED,
            short,
            *overrides,
            f"runs_dir={folder}",
            f"name={name}",
        )
        assert done.returncode == 0, done.stderr
        jobs = program.jobs(folder, name)
        found[name] = {job.partition(",")[0].removeprefix("router="): path for job, path in jobs.items()}
    return found


@pytest.mark.parametrize(("setting", "arm"), [("two_ranks", "top_k"), ("checkpointing", "base")])
def test_padded_batches_give_the_same_numbers_however_they_are_cut(
    padded: dict[str, dict[str, Path]], arm: str, setting: str
) -> None:
    plain, other = padded["plain"][arm], padded[setting][arm]
    names = ("train/loss", "validation/loss", "final/loss")
    assert losses(other, *names) == pytest.approx(losses(plain, *names), rel=2e-5)
    manifests = [program.read(path / "manifest.json") for path in (plain, other)]
    # Recomputation, padding and ranks all could count an assignment twice.
    for field in ("batch_fingerprint", "tokens", "assignments", "assignments_dropped"):
        assert manifests[0][field] == manifests[1][field], field


def test_padding_is_no_load(padded: dict[str, dict[str, Path]]) -> None:
    manifest = program.read(padded["plain"]["top_k"] / "manifest.json")
    assert manifest["tokens"] < 4 * 16 * 32, "some of the 4 steps of 16 sequences of 32 positions is padding"
    assert manifest["assignments"] == 2 * manifest["tokens"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.precision=bf16-mixed", "router=base"),
        ("trainer.precision=bf16-mixed", "router=switch", "router.capacity_factor=0.5"),
        ("model=paper", "router=base"),
        ("model.placement=insert", "model.sparse_layers=[0,2]", "model.positions=learned", "router=top_k"),
        ("logger=csv", "data.num_workers=2", "module.schedule=linear", "router=uniform"),
    ],
    ids=[
        "bf16 base",
        "bf16 switch that drops",
        "the paper's placement",
        "inserted layers",
        "workers and no tensorboard",
    ],
)
def test_a_run_with_other_options_ends_with_finite_losses(
    overrides: tuple[str, ...], small_corpus: list[str], tmp_path: Path
) -> None:
    done = program.train(*small_corpus, *STEPS, *overrides, f"runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    path = program.only_job(tmp_path)
    found = losses(path, "train/loss", "final/loss")
    assert len(found) == 5
    assert all(0 < loss < 8 for loss in found)
    assert (path / "tensorboard").exists() == ("logger=csv" not in overrides)


def test_a_schedule_that_a_short_run_or_a_low_rate_leaves_no_room_is_cut_and_said() -> None:
    config, _ = configuration(["trainer.max_steps=16", "module.warmup_steps=20", "module.learning_rate=1e-4"])
    module, sentences = fit_schedule(config)
    assert (module.warmup_steps, module.final_learning_rate) == (2, 1e-5)
    assert sentences == [
        "module.warmup_steps=20 exceeds trainer.max_steps=16: warming up for 2",
        "module.final_learning_rate=0.00025 exceeds module.learning_rate=0.0001: ending at 1e-05",
    ]
    assert build_module(config).optimizer_options["warmup_steps"] == 2
    config, _ = configuration(["trainer.max_steps=20", "module.warmup_steps=20", "module.learning_rate=2.5e-4"])
    assert fit_schedule(config) == (config.module, [])


def test_a_warm_up_below_one_is_a_share_of_the_run() -> None:
    for steps, warmup in ((160, 20), (40, 5), (4, 0)):
        config, _ = configuration([f"trainer.max_steps={steps}"])
        assert fit_schedule(config) == (dataclasses.replace(config.module, warmup_steps=warmup), [])
        assert build_module(config).optimizer_options["warmup_steps"] == warmup
    with pytest.raises(
        ConfigError, match=r"module\.warmup_steps=1\.5 .* a whole number of steps, or a share of the run"
    ):
        configuration(["module.warmup_steps=1.5"])


def test_a_coefficient_is_that_of_a_loss_some_router_has() -> None:
    for router, name in (("switch", "load_balancing_loss"), ("base", "router_z_loss"), ("switch", "importance_loss")):
        config, _ = configuration([f"router={router}", f"+module.loss_coefficients.{name}=0.5"])
        assert config.module.loss_coefficients == {name: 0.5}
    with pytest.raises(
        ConfigError, match=r"load_balance_loss: no router has such a loss; did you mean load_balancing_lo"
    ):
        configuration(["router=switch", "+module.loss_coefficients.load_balance_loss=100.0"])
