"""Which arguments of Lightning's Trainer a configuration may add, and what is said about the others."""

import csv
import inspect
from pathlib import Path
from typing import Any

import program
import pytest
from omegaconf import OmegaConf
from pytorch_lightning import Trainer

from lightning_base.instantiation import ConfigError
from lightning_base.program.config import TrainerConfig
from lightning_base.program.read_config import read_config
from lightning_base.program.trainer_arguments import REFUSED, check_trainer_argument, without_plus

OWN = ("max_steps", "threads")


def refusal(name: str, value: object) -> str:
    with pytest.raises(ConfigError) as caught:
        check_trainer_argument(name, value, OWN)
    return str(caught.value)


def test_every_argument_of_the_trainer_is_a_key_is_refused_or_is_passed_on() -> None:
    arguments = set(inspect.signature(Trainer).parameters)
    own = set(inspect.signature(TrainerConfig).parameters) - {"lightning"}
    assert REFUSED.keys() <= arguments, "a reason for an argument that there is not"
    assert not REFUSED.keys() & own
    # A new version of Lightning with another argument has to be thought about.
    assert arguments - own - REFUSED.keys() == {
        "limit_val_batches",
        "limit_predict_batches",
        "num_sanity_val_steps",
        "enable_model_summary",
        "enable_autolog_hparams",
        "deterministic",
        "benchmark",
        "inference_mode",
        "sync_batchnorm",
    }


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_comparison_does_not_bear_is_refused_with_the_reason(name: str) -> None:
    assert refusal(name, 1) == f"trainer.{name} is not passed to Lightning's Trainer: {REFUSED[name]}"
    assert without_plus(name) == refusal(name, 1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("limit_vall_batches", 2, "no argument of Lightning's Trainer; did you mean limit_val_batches"),
        ("max_stepz", 2, "did you mean max_steps"),
        ("benchmark", "yes", "trainer.benchmark='yes' should be true or false or null"),
        ("deterministic", "sometimes", "trainer.deterministic='sometimes' should be true or false or warn or null"),
        ("limit_val_batches", "some", "trainer.limit_val_batches='some' should be a whole number or a number or null"),
        ("limit_val_batches", -1, "trainer.limit_val_batches=-1 is out of range: give a number of batches, or a share"),
        ("limit_val_batches", 1.5, "trainer.limit_val_batches=1.5 is out of range"),
        ("lightning", {"max_epochs": 3}, "trainer.lightning is no key of the configuration"),
    ],
)
def test_a_name_or_value_that_the_trainer_does_not_take_is_refused(name: str, value: object, message: str) -> None:
    assert message in refusal(name, value)


@pytest.mark.parametrize(
    ("name", "value"), [("limit_val_batches", 2), ("limit_val_batches", 0.5), ("deterministic", "warn")]
)
def test_other_arguments_are_taken_and_without_a_plus_told_of_it(name: str, value: object) -> None:
    check_trainer_argument(name, value, OWN)
    assert str(without_plus(name)).endswith(f"added with a plus: +trainer.{name}=...")


def test_a_key_that_nobody_has_is_not_taken_for_the_trainers() -> None:
    assert without_plus("max_stepz") is None


@pytest.fixture(scope="module")
def with_arguments(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a run with arguments for the Trainer, and what it printed."""
    folder = tmp_path_factory.mktemp("with_arguments")
    added = ("+trainer.limit_val_batches=1", "+trainer.enable_model_summary=true", "+trainer.deterministic=warn")
    done = program.train(*small_corpus, *added, "router=uniform", "data.validation_sequences=64", f"runs_dir={folder}")
    assert done.returncode == 0, done.stderr
    return program.only_job(folder), done.stdout + done.stderr


def test_they_reach_the_trainer(with_arguments: tuple[Path, str]) -> None:
    directory, printed = with_arguments
    assert "LanguageModel" in printed or "Transformer" in printed, "a summary of the model"
    with open(directory / "expert_load.csv", newline="") as file:
        routed = [int(row["demand"]) for row in csv.DictReader(file) if row["stage"] == "validation_pass"]
    # Two passes, each of one batch of 16 sequences of 32 tokens instead of the four that 64 sequences make.
    assert sum(routed) == 2 * 16 * 32
    plain: Any = OmegaConf.to_container(OmegaConf.load(directory / ".hydra" / "config.yaml"))
    added = {"limit_val_batches": 1, "enable_model_summary": True, "deterministic": "warn"}
    assert read_config(plain).trainer.lightning == added


def test_they_stand_in_the_certificate(with_arguments: tuple[Path, str]) -> None:
    recorded = program.read(with_arguments[0] / "manifest.json")["config"]["trainer"]
    assert recorded["limit_val_batches"] == 1
    assert recorded["deterministic"] == "warn"
