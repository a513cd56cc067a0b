"""The site: it builds without a warning, has every public name, and fetches nothing."""

import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from forks import REPOSITORY

import lightning_base
from lightning_base import routing


def build(project: Path, target: Path) -> subprocess.CompletedProcess:
    """``mkdocs build`` of a project that may be a copy without the package."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--config-file", project / "mkdocs.yml", "--site-dir", target],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def copy(folder: Path) -> Path:
    """The project with its links followed."""
    shutil.copytree(REPOSITORY / "docs", folder / "docs")
    configuration = (REPOSITORY / "mkdocs.yml").read_text()
    (folder / "mkdocs.yml").write_text(configuration.replace("paths: [.]", f"paths: ['{REPOSITORY}']"))
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(REPOSITORY, target)
    assert done.returncode == 0, done.stderr
    return target


def documented(site: Path) -> set[str]:
    """The names that have a place in the API pages, from the inventory that Sphinx and its like read."""
    content = (site / "objects.inv").read_bytes()
    lines = zlib.decompress(content.split(b"\n", 4)[4]).decode().splitlines()
    return {line.split(" ")[0].rpartition(".")[2] for line in lines if " py:" in line}


@pytest.mark.exhaustive
def test_every_public_name_is_in_the_api(site: Path) -> None:
    named = {*lightning_base.__all__, *routing.__all__, "LanguageModel", "load", "balanced_assignments", "forward"}
    assert named - documented(site) == set()


@pytest.mark.exhaustive
def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    found = [
        f"{page.name}: {source}"
        for page in site.rglob("*.html")
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text())
        for source in re.findall(r"(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", tag)
        if "rel=canonical" not in tag and 'rel="canonical"' not in tag
    ]
    assert len(list(site.rglob("*.html"))) > 15
    assert found == []


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("page", "added", "said"),
    [
        ("index.md", "[1](no_such_page.md) [2](tutorial.md#no-such-heading)", ("no_such_page.md", "no-such-heading")),
        ("api/model.md", "::: lightning_base.export.no_such_name", ("no_such_name",)),
    ],
)
def test_a_dead_link_or_name_fails_the_build(page: str, added: str, said: tuple[str, ...], tmp_path: Path) -> None:
    project = copy(tmp_path / "project")
    with open(project / "docs" / page, "a") as file:
        file.write(f"\n{added}\n")
    done = build(project, tmp_path / "site")
    assert done.returncode != 0
    assert [name for name in said if name not in done.stderr] == []
