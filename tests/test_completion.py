"""What a shell completes after ``eval "$(lightning-base train -sc install=bash)"``, asked as its function asks."""

import forks
import pytest

ANSWERS = {
    "lightning-base tra": "train report analysis export check-router benchmark",
    "lightning-base train router=swi": "router=switch",
    "lightning-base train router=base trainer.max_": "trainer.max_steps=",
}


@pytest.mark.parametrize("line", ANSWERS)
def test_programs_keys_and_choices_are_completed(line: str) -> None:
    environment = {**forks.plain_environment(), "COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = forks.run(["-m", "lightning_base", "-sc", "query=bash"], environment=environment)
    assert (done.returncode, done.stdout.split()) == (0, ANSWERS[line].split()), done.stderr
