"""Which code ran: a run does not go on with another, and a hash tells two of them apart."""

import subprocess
from pathlib import Path
from typing import Any

import forks
import program
import pytest
import pytorch_lightning as pl
from their_package import install

from lightning_base.callbacks.certificate import Certificate
from lightning_base.program.run_directory import RunDirectory
from lightning_base.program.sources import git_commit, source_hash

FAILS = """
from their_package import MyRouter
import torch


class Fails(MyRouter):
    def __init__(self, *, num_experts: int) -> None:
        super().__init__(num_experts=num_experts)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def end_step(self, sums):
        self.step += 1
        if self.step == 3:
            raise RuntimeError("mend me")
"""


def test_a_run_is_not_half_of_one_router_and_half_of_another(small_corpus: list[str], tmp_path: Path) -> None:
    install(tmp_path, "their_package")
    source = tmp_path / "failing_router.py"
    with_packages = {**program.environment(), "PYTHONPATH": f"{program.REPOSITORY}:{tmp_path}"}

    def train(name: str, *more: str) -> tuple[int, str]:
        arguments = ("plugins=[failing_router]", "router=failing_router.Fails", "trainer.max_steps=4", *more)
        arguments += ("trainer.checkpoint_every_n_steps=2",)
        command = program.command(*small_corpus, *arguments, f"runs_dir={tmp_path}/runs", f"name={name}")
        done = forks.run(command, environment=with_packages)
        return done.returncode, done.stderr

    for step, name in ((1, "unsaved"), (3, "saved")):
        source.write_text(FAILS.replace("== 3", f"== {step}"))
        assert train(name)[0] == 1
    source.write_text(FAILS.replace("== 3", "== 0"))
    code, said = train("saved")
    assert code == 2
    assert "router._target_ is of failing_router, which has changed since the run" in said
    assert said.strip().endswith("put it back, choose another name=..., or start over with resume=never")
    # Nothing that was computed with the old one would be kept.
    assert train("saved", "resume=never")[0] == 0
    assert train("unsaved")[0] == 0
    manifest = program.read(program.only_job(tmp_path / "runs", "saved") / "manifest.json")
    # What it inherits from counts too.
    assert list(manifest["sources"]["router"]) == ["failing_router", "their_package"]
    assert manifest["earlier_sources"] == []


def test_steps_of_an_earlier_source_stay_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path)
    before, now = ({"router": {"their_package": {"version": "1", "source_sha256": digit * 64}}} for digit in "ab")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    state: dict[str, Any] = {"layouts": [], "sources": []}
    for sources, expected in ((before, []), (before, []), (now, [before])):
        certificate = Certificate(run, {"strategy": {"name": "single"}})
        certificate.load_state_dict(state)
        run.write_manifest(sources=sources)
        certificate.on_train_start(trainer, pl.LightningModule())
        assert run.manifest()["earlier_sources"] == expected
        assert ("the code is not that of the steps so far" in capsys.readouterr().err) == bool(expected)
        state = certificate.state_dict()


def test_the_commit_is_that_of_the_package_and_not_of_the_repository_it_is_installed_in(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=me", "-c", "user.email=me@example.org")
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    installed = tmp_path / "lib" / "sources.py"
    installed.parent.mkdir()
    installed.write_text("first = 1\n")
    assert git_commit(installed) is None
    git("init")
    (tmp_path / "thesis.tex").write_text("mine")
    git("add", "thesis.tex")
    git("commit", "-m", "mine")
    assert git_commit(installed) is None
    git("add", "lib")
    git("commit", "-m", "a copy of the package")
    commit = git("rev-parse", "HEAD").strip()
    assert git_commit(installed) == commit
    installed.write_text("first = 2\n")
    assert git_commit(installed) == f"{commit}-dirty"


@pytest.mark.parametrize("kind", ["a module", "a package", "a folder without an __init__.py"])
def test_the_hash_of_a_source_changes_with_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"changing_{len(kind)}"
    file = tmp_path / f"{name}.py" if kind == "a module" else tmp_path / name / "part.py"
    file.parent.mkdir(exist_ok=True)
    if kind == "a package":
        (tmp_path / name / "__init__.py").touch()
    file.write_text("first = 1\n")
    before = source_hash(name)
    file.write_text("first = 2\n")
    assert source_hash(name) != before
