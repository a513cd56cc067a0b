"""What a shell completes after ``eval "$(lightning-base train -sc install=bash)"``, asked as its function asks."""

import forks
import pytest

from lightning_base import __version__
from lightning_base.program import entry

ANSWERS = {
    "lightning-base tra": "train report analysis export check-router benchmark",
    "lightning-base ": "train report analysis export check-router benchmark",
    "lightning-base report ": "",
    "lightning-base check-router ba": "",
    "lightning-base train router=swi": "router=switch",
    "lightning-base train router=base trainer.max_": "trainer.max_steps=",
}


@pytest.mark.parametrize("line", ANSWERS)
def test_programs_keys_and_choices_are_completed(line: str) -> None:
    environment = {**forks.plain_environment(), "COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = forks.run(["-m", "lightning_base", "-sc", "query=bash"], environment=environment)
    assert (done.returncode, done.stdout.split()) == (0, ANSWERS[line].split()), done.stderr


def test_the_command_says_its_version_and_that_of_what_it_stands_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-base", "--version"])
    assert entry.main() == 0
    assert capsys.readouterr().out.startswith(f"lightning-base {__version__} (torch ")


def test_the_help_of_train_says_what_it_is() -> None:
    done = forks.run(["-m", "lightning_base", "train", "--help"])
    assert done.stdout.startswith(
        "lightning-base train [-m] [key=value ...] trains one arm, or with -m a sweep of arms"
    )
