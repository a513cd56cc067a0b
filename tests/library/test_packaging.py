"""What is built is whole, and what it says it needs is what it needs."""

import ast
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import distribution, packages_distributions, version
from pathlib import Path

import pytest
from packages import PIP, REPOSITORY, copy_source, run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LOWEST = REPOSITORY / "tests" / "versions" / "lowest.txt"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
CORE = {canonicalize_name(Requirement(line).name): Requirement(line) for line in PROJECT["dependencies"]}
# Prints the version of every distribution that it is given, and the folder it lies in.
WHERE = """
import sys
from importlib.metadata import distribution
for name in sys.argv[1:]:
    found = distribution(name)
    print(name, found.version, found.locate_file(""))
"""
# Imported names that come with another package, which needs them whatever its version.
COMES_WITH = {"lightning-fabric": "pytorch-lightning", "markupsafe": "jinja2"}
# What only some programs use, and ask for by a sentence where it is missing.
EXTRAS = {
    canonicalize_name(Requirement(line).name)
    for name, lines in PROJECT["optional-dependencies"].items()
    for line in lines
    if name != "dev"
}


def imported() -> dict[str, set[str]]:
    """The distributions that the package imports anywhere, each with the files that do."""
    homes = packages_distributions()
    found: dict[str, set[str]] = {}
    for path in sorted((REPOSITORY / "lightning_base").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in names} - {"lightning_base", *sys.stdlib_module_names}:
                # An import that is not installed has no home, and is taken for a distribution of its own name.
                home = canonicalize_name(homes.get(name, [name])[0])
                found.setdefault(COMES_WITH.get(home, home), set()).add(str(path))
    return found


def test_the_package_imports_all_that_it_depends_on_and_nothing_else_but_extras() -> None:
    found = imported()
    assert CORE.keys() - found.keys() == set()
    others = {name: sorted(files) for name, files in found.items() if name not in CORE}
    assert others.keys() - EXTRAS == set(), others
    assert not {"pandas", "datasets", "transformers"} & CORE.keys()


def lowest_versions() -> dict[str, str]:
    """What is tried, by distribution."""
    pins = {}
    for line in LOWEST.read_text().splitlines()[1:]:  # after the command that makes it
        name, _, pinned = line.partition("==")
        pins[canonicalize_name(name)] = pinned
    return pins


def test_the_lowest_versions_are_those_that_the_package_says_it_works_with() -> None:
    pins = lowest_versions()
    for name, requirement in CORE.items():
        (lowest,) = (spec.version for spec in requirement.specifier if spec.operator in ("==", ">="))
        if name == "torch":  # half a gigabyte: the one that is there is taken, and is the lowest
            assert Version(lowest) == Version(Version(version("torch")).public)
        else:
            assert Version(pins[name]) == Version(lowest), f"{name} {pins[name]} is tried, not {lowest}"


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"].keys() - {"bench", "dev", "docs"}))
def test_an_extra_asks_for_no_less_than_what_was_tried(extra: str) -> None:
    tried = dict(line.lower().split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines())
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        (lowest,) = (spec.version for spec in requirement.specifier if spec.operator == ">=")
        pinned = Version(tried[canonicalize_name(requirement.name)])
        assert pinned in requirement.specifier
        assert pinned.release[: len(Version(lowest).release)] == Version(lowest).release, f"{requirement} was not tried"


@pytest.mark.exhaustive
def test_wheel_and_sdist_build_clean_and_hold_the_same(wheel: Path, tmp_path: Path) -> None:
    source, built = copy_source(tmp_path), tmp_path / "built"
    # The wheel from the sdist, as whoever installs that would build it.
    printed = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, source, cwd=tmp_path)
    assert "warning" not in printed.lower()
    (sdist,), (again,) = built.glob("*.tar.gz"), built.glob("*.whl")
    checked = run(sys.executable, "-m", "twine", "check", "--strict", sdist, again, wheel, cwd=tmp_path)
    assert checked.count("PASSED") == 3
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "lightning_base/py.typed"} <= names


@pytest.fixture(scope="module")
def lowest(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the lowest versions and nothing else. Its torch is the one that is here,
    linked: it is the lowest as it is, and unpacking another takes longer than all the rest."""
    folder = tmp_path_factory.mktemp("lowest")
    venv.create(folder, with_pip=False)
    (site,) = (folder / "lib").glob("python3*/site-packages")
    torch = distribution("torch")
    for top in {file.parts[0] for file in torch.files or () if file.parts[0] not in ("..", "__pycache__")}:
        (site / top).symlink_to(Path(str(torch.locate_file(top))))
    install = (*PIP, "--python", folder / "bin" / "python", "install", "--no-deps", "--no-compile")
    run(*install, "--requirement", LOWEST, wheel, cwd=folder, timeout=500)
    return folder / "bin" / "python"


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the lowest versions are those with wheels for Python 3.11")
def test_the_program_works_with_the_lowest_version_of_every_dependency(
    lowest: Path, small_corpus: list[str], tmp_path: Path
) -> None:
    pins = {name: pinned for name, pinned in lowest_versions().items() if name in CORE}
    printed = run(lowest, "-I", "-c", WHERE, *sorted(pins), cwd=tmp_path)
    seen = {name: (found, home) for name, found, home in map(str.split, printed.splitlines())}
    assert {name: found for name, (found, _) in seen.items()} == pins
    assert {Path(home).is_relative_to(lowest.parents[1]) for _, home in seen.values()} == {True}
    command = (lowest, "-I", lowest.with_name("lightning-base"))
    options = (*small_corpus, "trainer.max_steps=2", "trainer.checkpoint_every_n_steps=1", "name=two")
    run(*command, "train", "-m", *options, "router=base,top_k", cwd=tmp_path)
    run(*command, "report", "runs/two", cwd=tmp_path)
    assert "top_k" in (tmp_path / "runs" / "two" / "report.html").read_text()
    (base, _) = sorted(path.parent for path in tmp_path.glob("runs/two/*/manifest.json"))
    assert "analysis.html" in run(*command, "analysis", base, cwd=tmp_path)
    run(*command, "export", base, cwd=tmp_path)
    assert (base / "export" / "model.safetensors").exists()
