"""Breaks a copy of the package in one place at a time, and says which faults the short form of the tests finds.

``python tests/mutations [part of a name]``, where `make test` passes; exits 1 if a fault is not found.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults import FAULTS, Fault

REPOSITORY = Path(__file__).resolve().parents[2]
COPIED = ("lightning_base", "conf", "tests", "experiments", "notebooks", "docs")
AT_ONCE = 2


def copy(folder: Path) -> Path:
    """The project in a folder of its own, with Numba's compiled code, which knows its source by the time it changed."""
    for name in COPIED:
        shutil.copytree(REPOSITORY / name, folder / name, symlinks=True, copy_function=shutil.copy2)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(REPOSITORY / name, folder)
    return folder


def run_tests(project: Path, tests: str) -> subprocess.CompletedProcess:
    paths = [f"tests/{part}" if ".py" in part else part for part in tests.split()]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths, "-m", "not exhaustive"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )


def check(fault: Fault) -> str:
    """``found``, or what happened instead."""
    with tempfile.TemporaryDirectory(prefix="mutation_") as folder:
        project = copy(Path(folder))
        file = project / "lightning_base" / fault.file
        file.write_text(file.read_text().replace(fault.old, fault.new))
        done = run_tests(project, fault.tests)
        if done.returncode == 1:
            failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            return "found: " + failed[0].partition(" ")[2].partition(" - ")[0]
        return f"SURVIVED, exit code {done.returncode}\n{done.stdout[-1000:]}"


def main() -> int:
    """Gives the exit code."""
    chosen = [fault for fault in FAULTS if all(part in fault.name for part in sys.argv[1:])]
    for fault in chosen:
        count = (REPOSITORY / "lightning_base" / fault.file).read_text().count(fault.old)
        if count != 1:
            print(f"error: {fault.name}: its text is {count} times in {fault.file}; this list has to follow the code")
            return 2
    missed = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for fault, answer in zip(chosen, pool.map(check, chosen), strict=True):
            missed += not answer.startswith("found")
            print(f"{fault.name}: {answer}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults found")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
