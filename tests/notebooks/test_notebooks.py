"""Every notebook runs from its first cell to its last on the runs of a real sweep."""

import json
import subprocess
import sys
from pathlib import Path

import forks
import program
import pytest


def where(runs: Path) -> dict[str, str]:
    return {"LIGHTNING_BASE_RUNS": str(runs)}


NOTEBOOKS = sorted((program.REPOSITORY / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of_a_notebook_runs_on_real_run_directories(notebook: Path, small_sweep: Path) -> None:
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = forks.run(["-c", code], environment={**program.environment(), **where(small_sweep), "MPLBACKEND": "agg"})
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
        env={**program.environment(), **where(small_sweep), **inline},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(notebook: Path) -> None:
    cells = json.loads(notebook.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
