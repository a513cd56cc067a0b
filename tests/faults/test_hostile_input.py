"""A configuration or a name that would call something is refused, and what it would make is not there.

Hostile checkpoints are in tests/test_checkpoint.py and test_checkpoints_that_cannot_be_used.py, exports in
tests/test_export.py.
"""

from pathlib import Path

import program
import pytest
from hydra.utils import instantiate

LONG = pytest.mark.exhaustive
CASES = {
    "router": ("router._target_=os.mkdir", "+router.path={}"),
    "callback": ("+callbacks.mine={{_target_: os.mkdir, path: {}}}",),
    "corpus": ("data.corpus._target_=os.mkdir", "+data.corpus.path={}"),
    "option of a router": ("router.num_experts={{_target_: os.mkdir, path: {}}}",),
    "name that is a path": ("name={}",),
    "name for a shell": ("name='$(mkdir {})'",),
}
SHORT = ("callback", "name for a shell")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[] if case in SHORT else LONG) for case in CASES])
def test_what_would_run_something_is_refused_and_nothing_has_run(case: str, tmp_path: Path) -> None:
    marker = tmp_path / "it_ran"
    overrides = [override.format(marker) for override in CASES[case]]
    done = program.train(*overrides, "debug=fast", f"runs_dir={tmp_path}/runs")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not marker.exists()
    assert not list(tmp_path.rglob("status.json")), "no run has begun"
    # Hydra by itself would have called it.
    instantiate({"_target_": "os.mkdir", "path": str(marker)})
    assert marker.exists()
