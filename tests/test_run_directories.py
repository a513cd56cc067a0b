"""Run directories: skipped when done, refused when they are somebody else's."""

from pathlib import Path

import program
import pytest
from omegaconf import OmegaConf


@pytest.fixture(scope="module")
def finished(small_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments of a sweep that is done, and its runs directory."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = ["-m", *small_corpus, "router=uniform,switch", f"runs_dir={folder}"]
    done = program.train(*arguments)
    assert done.returncode == 0, done.stderr
    return arguments, folder


def test_a_second_call_skips_what_is_done_and_says_so(finished: tuple[list[str], Path]) -> None:
    arguments, folder = finished
    # As an earlier version has left it, which did not know some options that now have their defaults.
    for path in program.jobs(folder).values():
        config = OmegaConf.load(path / ".hydra" / "config.yaml")
        del config["callbacks"]
        config["router"].pop("gate", None)
        OmegaConf.save(config, path / ".hydra" / "config.yaml")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    again = program.train(*arguments)
    assert again.returncode == 0
    assert again.stderr.count("skipping") == 2
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")} == before


def test_a_run_directory_holds_what_the_design_promises(finished: tuple[list[str], Path]) -> None:
    _, folder = finished
    for path in program.jobs(folder).values():
        assert program.read(path / "status.json")["state"] == "done"
        assert (path / ".hydra" / "config.yaml").is_file()
        assert (path / ".hydra" / "overrides.yaml").is_file()
        assert list((path / "tensorboard").glob("events.out.tfevents.*"))
        assert list((path / "checkpoints").glob("step_4.ckpt"))
        manifest = program.read(path / "manifest.json")
        assert {"corpus_fingerprint", "batch_fingerprint", "initial_weights_fingerprint", "ledger"} <= manifest.keys()
        assert manifest["result"]["final/loss"] == program.series(path, "final/loss")[-1][1]


def test_the_same_directory_for_another_configuration_is_refused(finished: tuple[list[str], Path]) -> None:
    _, folder = finished
    path = next(iter(program.jobs(folder).values()))
    config = path / ".hydra" / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("warmup_steps: 1", "warmup_steps: 2"))
    try:
        again = program.train(*finished[0])
    finally:
        config.write_text(before)
    assert again.returncode == 2
    assert "holds a run with module.warmup_steps=2, not 1: choose another name=..., or start over with" in again.stderr
    assert "make" not in again.stderr


def test_what_changes_no_number_may_differ_and_another_arm_may_join(
    finished: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, folder = finished
    (folder / "joining_router.py").write_text("from lightning_base import Switch\nclass Joins(Switch): ...\n")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    others = [argument for argument in arguments if not argument.startswith("router=")]
    more = ("plugins=[joining_router]", "router=uniform,switch,joining_router.Joins", "logger=csv")
    again = program.train(*others, *more)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("skipping") == 2
    assert "3 of 3 jobs done" in again.stderr


def test_a_foreign_directory_is_refused_before_any_training(small_corpus: list[str], tmp_path: Path) -> None:
    foreign = tmp_path / "debug" / "theirs"
    foreign.mkdir(parents=True)
    (foreign / "thesis.tex").write_text("mine")
    done = program.train(
        "-m", *small_corpus, "router=uniform,switch", f"runs_dir={tmp_path}", "hydra.sweep.subdir=theirs"
    )
    assert done.returncode == 2
    assert "is not empty and has no status.json" in done.stderr
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_a_run_directory_is_refused(small_corpus: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = program.train(*small_corpus, f"runs_dir={tmp_path}", f"hydra.run.dir={tmp_path}/file")
    assert done.returncode == 2
    assert (tmp_path / "file").read_text() == "mine"
