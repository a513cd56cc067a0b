"""The wheel in an environment of its own: the declared dependencies, a model to put layers into, and no more."""

import json
import re
import subprocess
import tomllib
import venv
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import forks
import pages
import pytest
from packages import PIP, run
from packaging.requirements import Requirement

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def needed(requirements: list[str], extras: frozenset[str] = frozenset()) -> dict[str, Distribution]:
    """The installed distributions that these requirements bring, and what those need, by name."""
    found: dict[str, Distribution] = {}
    waiting = [(Requirement(text), extras) for text in requirements]
    while waiting:
        requirement, extras = waiting.pop()
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}
        )
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if not wanted or (name in found and not requirement.extras):
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # such as a platform's own wheels, which an installed torch may lack
        waiting += [(Requirement(text), frozenset(requirement.extras)) for text in found[name].requires or ()]
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment: the wheel, links to the dependencies that pyproject.toml declares, and to
    ``transformers``, whose GPT-2 the page puts layers into."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False)
    interpreter = folder / "venv" / "bin" / "python"
    run(*PIP, "--python", interpreter, "install", "--no-deps", "--no-index", wheel, cwd=folder)

    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    links = folder / "dependencies"
    links.mkdir()
    for found in needed([*declared, "transformers"]).values():
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = Path(str(found.locate_file(top)))
            if not (links / top).exists():
                (links / top).symlink_to(target)
    (site,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    (site / "dependencies.pth").write_text(f"{links}\n")
    return interpreter


def test_the_wheel_holds_the_package_with_its_configuration_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if not name.startswith("lightning_base-")} == {"lightning_base"}
    sources = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "lightning_base").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    sources |= {f"lightning_base/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "conf").rglob("*.yaml")}
    assert {name for name in names if name.startswith("lightning_base/")} == sources


def check_what_it_saw(printed: str) -> dict[str, Any]:
    """Of the program in plain PyTorch."""
    seen = json.loads(printed)
    assert sum(seen["losses"][-3:]) / 3 < seen["losses"][0] - 0.8
    # 2 groups of 4 sequences of 16 tokens over 8 experts.
    assert seen["loads"] == [[8] * 8] * 2
    return seen


def test_a_program_trains_in_plain_pytorch(tmp_path: Path) -> None:
    done = forks.run([HERE / "plain_pytorch_program.py"], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    check_what_it_saw(done.stdout)


@pytest.mark.exhaustive
def test_a_program_trains_in_plain_pytorch_from_the_installed_wheel(python: Path, tmp_path: Path) -> None:
    seen = check_what_it_saw(run(python, "-I", HERE / "plain_pytorch_program.py", cwd=tmp_path))
    assert Path(seen["file"]).is_relative_to(python.parents[1])
    assert not {"hydra", "omegaconf", "pytorch_lightning", "lightning_fabric", "tensorboard"} & set(seen["imported"])


@pytest.mark.exhaustive
def test_the_code_of_the_page_runs_from_the_wheel_and_does_what_it_says(python: Path, tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text(pages.python_program(REPOSITORY / "docs" / "library.md"))
    run(python, "-I", "library.py", cwd=tmp_path)
    header, *rows = (tmp_path / "loads.csv").read_text().splitlines()
    assert header == "step,stage,layer,expert,demand,load"
    # 2 steps are recorded, of a layer with 4 experts and one with 8.
    assert len(rows) == 2 * (4 + 8)


def test_every_part_of_the_package_imports_with_the_declared_dependencies(python: Path, tmp_path: Path) -> None:
    # ``analysis`` and the like may need an extra: they say so themselves; what a program starts from may not.
    programs = "lightning_base.program.command, lightning_base.program.rank, lightning_base.report"
    code = f"import {programs}; from lightning_base import *"
    run(python, "-I", "-c", code, cwd=tmp_path)
    for tool in ("hypothesis", "beartype", "nbmake"):
        missing = subprocess.run([python, "-I", "-c", f"import {tool}"], cwd=tmp_path, capture_output=True, text=True)
        assert "ModuleNotFoundError" in missing.stderr, "the environment is not as empty as it should be"


@pytest.mark.exhaustive
def test_the_command_sweeps_and_reports_in_an_empty_folder(
    python: Path, small_corpus: list[str], tmp_path: Path
) -> None:
    own, empty = tmp_path / "own" / "experiment", tmp_path / "empty"
    own.mkdir(parents=True)
    empty.mkdir()
    (own / "mine.yaml").write_text("# @package _global_\ntrainer:\n  max_steps: 2\n")
    command = (python, "-I", python.with_name("lightning-base"))
    mine = ("--config-dir", own.parent, "experiment=mine", "name=two", "router=base,switch")
    run(*command, "train", "-m", *mine[:2], *small_corpus, *mine[2:], cwd=empty)
    assert {path.name for path in empty.iterdir()} == {"runs"}
    run(*command, "report", "runs/two", cwd=empty)
    assert "Switch" in (empty / "runs" / "two" / "report.html").read_text()
    assert "capacity_factor: 1.25" in run(*command, "train", "--cfg", "job", "router=switch", cwd=empty)
    # The wheel's own files, not those of the repository.
    assert str(python.parents[1]) in run(*command, "train", "--info", "searchpath", cwd=empty)


def test_a_program_that_is_not_there_gets_one_sentence(python: Path, tmp_path: Path) -> None:
    command = [python, "-I", python.with_name("lightning-base"), "trane"]
    wrong = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr == "error: trane is no program of lightning-base; did you mean train?\n"
