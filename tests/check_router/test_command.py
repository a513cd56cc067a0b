"""``lightning-base check-router`` on a package outside of this repository, and what it refuses."""

import shutil
import sys
from pathlib import Path

import forks
import pytest
import wrong_routers

from lightning_base.check_router import ALL
from lightning_base.check_router.command import options_of, subject_of
from lightning_base.instantiation import ConfigError


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages, as installed: one with the wrong routers, and one that does not import."""
    (tmp_path / "their_package").mkdir()
    shutil.copy(wrong_routers.__file__, tmp_path / "their_package" / "__init__.py")
    (tmp_path / "broken_package.py").write_text("1 / 0\n")
    information = tmp_path / "their_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: their_package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[lightning_base.routers]\ntheirs = their_package:Right\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("their_package", None)


def check_router(folder: Path, *arguments: str) -> tuple[int, dict[str, list[str]], str]:
    """The exit code, the verdict and the rest of the line of each check, and what went to stderr."""
    done = forks.run(["-m", "lightning_base", "check-router", *arguments], folder=folder)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "broken ", "not asked "))]
    names = {check.name: next((line for line in lines if f"  {check.name}  " in line), "") for check in ALL}
    verdicts = {name: [line[:9].strip(), line[11:].removeprefix(name).strip()] for name, line in names.items()}
    return done.returncode, verdicts, done.stderr


def test_a_package_of_somebody_else_is_asked_everything_and_told_what_it_breaks(site: Path) -> None:
    code, verdicts, errors = check_router(site, "their_package.KnowsItsRank", "num_experts=4", "--seconds", "120")
    assert code == 1, errors
    assert {name for name, (verdict, _) in verdicts.items() if verdict == "broken"} == {"ranks"}
    assert "expert" in verdicts["ranks"][1]
    assert "when one rank computed the batch at once" in verdicts["ranks"][1]
    assert verdicts["equal loads"] == ["not asked", "no plan says equal_loads"]
    assert {verdict for name, (verdict, _) in verdicts.items() if name not in ("ranks", "equal loads")} == {"ok"}


@pytest.mark.exhaustive
def test_an_installed_router_that_keeps_every_promise_ends_with_exit_code_0(site: Path) -> None:
    code, verdicts, errors = check_router(site, "theirs", "--seconds", "120")
    assert code == 0, (verdicts, errors)
    assert {verdict for verdict, _ in verdicts.values()} == {"ok", "not asked"}


def test_bad_input_ends_with_one_sentence_and_exit_code_2(site: Path) -> None:
    code, verdicts, errors = check_router(site, "broken_package.MyRouter")
    assert code == 2
    assert set(map(tuple, verdicts.values())) == {("", "")}
    assert errors == (
        "error: plugins=broken_package cannot be imported (ZeroDivisionError: division by zero): mend it first\n"
    )


@pytest.mark.parametrize(
    ("router", "options", "sentence"),
    [
        ("bsae", {}, "there is no router bsae, here or installed (name a class as package.Class); did you mean base"),
        ("nowhere_package.MyRouter", {}, "cannot be imported (ModuleNotFoundError"),
        ("their_package.Rihgt", {}, "router._target_=their_package.Rihgt does not exist"),
        ("their_package.replace", {}, "is not allowed: it only passes through their_package"),
        ("lightning_base.routing.router.Router", {}, "name a kind of it"),
        ("replay", {}, "routes the text of one run alone"),
        ("base", {"top_k": 99}, "router.top_k=99 with router.num_experts=8"),
        ("base", {"solvre": "auction"}, "router.solvre is not an option of BASE; did you mean solver?"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_a_sentence(router: str, options: dict, sentence: str, site: Path) -> None:
    with pytest.raises(ConfigError) as error:
        subject_of(router, options, [], 30.0).make()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_options_are_read_as_yaml_and_with_or_without_router_in_front() -> None:
    assert options_of(["router.top_k=2", "solver=transport", "gate=null"]) == {
        "top_k": 2,
        "solver": "transport",
        "gate": None,
    }
    with pytest.raises(ConfigError, match="top_k is no option: give the router's options as key=value"):
        options_of(["top_k"])


def test_a_router_of_ours_has_the_options_of_its_file_with_others_on_top() -> None:
    found = subject_of("switch", {"num_experts": 4}, [], 30.0)
    assert found.target == "lightning_base.routing.switch.Switch"
    assert (found.router.num_experts, found.options["capacity_factor"]) == (4, 1.25)
