"""How often a training step makes the host wait for the device."""

import json
from pathlib import Path

import forks
import pytest


@pytest.mark.parametrize("router", ["dense", "switch", "base"])
def test_a_step_waits_to_see_that_loss_and_gradient_are_finite_and_for_its_router_and_no_more(
    router: str, small_corpus: list[str], tmp_path: Path
) -> None:
    program = Path(__file__).with_name("waits_per_step.py")
    done = forks.run([str(program), str(tmp_path), router, *small_corpus], timeout=120)
    assert done.returncode == 0, done.stderr
    per_step = json.loads(done.stdout.splitlines()[-1])
    # The loader's batches and the seconds of a solver are on the host.
    on_host = ("data/", "callbacks/assignment.py")
    per_step = {asked: count for asked, count in per_step.items() if not asked.startswith(on_host)}
    routers = {asked for asked in per_step if asked.startswith(("routing/", "assignment/"))}
    assert {asked: per_step[asked] for asked in per_step.keys() - routers} == {
        "module.py:training_step": 1,
        "module.py:configure_gradient_clipping": 1,
    }
    # Dropping over capacity and an assignment on the host cannot do without.
    assert bool(routers) == (router != "dense")
