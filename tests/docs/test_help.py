"""Who asks for help is shown the five commands one needs."""

import re
import subprocess
import sys

import pytest
from forks import REPOSITORY

from lightning_base.program import entry

NEEDED = ["experiment", "claims", "report", "tensorboard", "test"]


@pytest.fixture(scope="module")
def told() -> tuple[list[str], list[str]]:
    """The targets under "what one needs", and the rest."""
    text = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    needed, _, rest = text.removeprefix("what one needs:\n").partition("the rest:\n")
    first, others = (re.findall(r"^  make (\S+) +\S", part, re.MULTILINE) for part in (needed, rest))
    return first, others


def test_make_help_begins_with_the_five_commands_one_needs(told: tuple[list[str], list[str]]) -> None:
    assert told[0] == NEEDED


def test_make_help_names_every_target(told: tuple[list[str], list[str]]) -> None:
    targets = re.findall(r"^\.PHONY: (.*)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert sorted(told[0] + told[1]) == sorted(" ".join(targets).split())


def test_the_command_tells_its_programs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-base", "--help"])
    assert entry.main() == 0
    assert re.findall(r"^  (\S+) +\S", capsys.readouterr().out, re.MULTILINE) == list(entry.PROGRAMS)
