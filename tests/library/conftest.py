from pathlib import Path

import packages
import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def wheel(shared: Path) -> Path:
    """Of this package, built once for all processes of the tests."""
    folder = shared / "wheel"
    with FileLock(shared / "wheel.lock"):
        if not folder.exists():
            source = packages.copy_source(shared / "wheel_source")
            build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
            packages.run(*packages.PIP, *build, cwd=shared)
    (built,) = folder.glob("*.whl")
    return built
