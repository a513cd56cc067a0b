"""Every notebook runs from its first cell to its last, on the runs of a real sweep where it looks at runs."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import program
import pytest


def small(runs: Path) -> dict[str, str]:
    return {"LIGHTNING_BASE_RUNS": str(runs), "LIGHTNING_BASE_STEPS": "3", "OMP_NUM_THREADS": "1"}


NOTEBOOKS = sorted((program.REPOSITORY / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of_a_notebook_runs(notebook: Path, small_sweep: Path) -> None:
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = forks.run(["-c", code], environment={**program.environment(), **small(small_sweep), "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_kernel(notebook: Path, small_sweep: Path) -> None:
    inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=300", "-p", "no:cacheprovider", str(notebook)],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=program.REPOSITORY,
        env={**program.environment(), **small(small_sweep), **inline},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_ran_from_top_to_bottom(notebook: Path) -> None:
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    # Neither failures and warnings, nor where it ran.
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    shown = [json.dumps({**output, "data": without_pictures(output)}) for output in outputs]
    assert not [text for text in shown if re.search(r"/(home|root|tmp|work|usr|Users)/", text)]


def without_pictures(output: dict[str, Any]) -> dict[str, Any]:
    return {kind: content for kind, content in output.get("data", {}).items() if kind != "image/png"}
