"""The built wheel in an empty folder: a sweep of two arms, its report, and Hydra's own flags."""

import shutil
import subprocess
import sys
from pathlib import Path

import program
import pytest

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools leaves a build folder beside the sources.
    sources = folder / "sources"
    for name in subprocess.check_output(["git", "ls-files"], cwd=program.REPOSITORY, text=True).splitlines():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(program.REPOSITORY / name, sources / name, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", ".", "--no-deps", "-w", str(folder)], cwd=sources, check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True, timeout=300
    )
    return folder / "site"


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The command ``lightning-base`` of the installed wheel."""
    environment = {**program.environment(), "PYTHONPATH": str(site)}
    command = [sys.executable, str(site / "bin" / "lightning-base"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_a_sweep_and_its_report_in_an_empty_folder(site: Path, small_corpus: list[str], tmp_path: Path) -> None:
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\ntrainer:\n  max_steps: 2\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    mine = ("experiment=mine", "name=two", "router=base,switch")
    swept = run(site, empty, "train", "-m", "--config-dir", str(own.parent), *small_corpus, *mine)
    assert swept.returncode == 0, swept.stderr
    assert {path.name for path in empty.iterdir()} == {"runs"}
    reported = run(site, empty, "report", "runs/two")
    assert reported.returncode == 0, reported.stderr
    page = (empty / "runs" / "two" / "report.html").read_text()
    assert "Switch" in page
    shown = run(site, empty, "train", "--cfg", "job", "router=switch")
    assert "capacity_factor: 1.25" in shown.stdout
    broken = run(site, empty, "train", "router=swich")
    # The wheel's own files, not those of the repository.
    assert (broken.returncode, str(site) in run(site, empty, "train", "--info", "searchpath").stdout) == (2, True)


def test_a_program_that_is_not_there(site: Path, tmp_path: Path) -> None:
    wrong = run(site, tmp_path, "trane")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: trane is no program of lightning-base; did you mean train?\n",
    )
    assert "benchmark" in run(site, tmp_path, "--help").stdout
