"""Which code runs: the versions and hashes of this package and of those that a configuration's classes come from."""

import hashlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_base.instantiation import resolve

# What a class of somebody's may build on: the certificate has the versions of these, and of this package more.
KNOWN = frozenset(("lightning_base", "torch", "pytorch_lightning", *sys.stdlib_module_names))


def code_sources(config: Mapping[str, Any]) -> dict[str, dict[str, dict[str, str]]]:
    """``plugin_sources``, and this package under the key ``program``."""
    released = sys.modules["lightning_base"].__version__  # without an import of what is above this file
    return {"program": {"lightning_base": source("lightning_base", released)}, **plugin_sources(config)}


def plugin_sources(config: Mapping[str, Any]) -> dict[str, dict[str, dict[str, str]]]:
    """The packages of others that a configuration's classes and their base classes come from.

    Args:
        config: checked, so that its plugins are declared.

    Returns:
        By key of the configuration and by package: ``version`` and ``source_sha256``.
    """
    found = {}
    for key, target in targets(config):
        packages = {kind.__module__.partition(".")[0] for kind in resolve(target, key, object).__mro__}
        if theirs := sorted(packages - KNOWN):
            found[key] = {package: source(package, version(package)) for package in theirs}
    return found


def targets(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every class that a configuration names and does not switch off, after its key."""
    for name, value in node.items():
        if isinstance(value, Mapping) and value.get("when", True):
            if "_target_" in value:
                yield f"{prefix}{name}", str(value["_target_"])
            yield from targets(value, f"{prefix}{name}.")


def source(package: str, released: str) -> dict[str, str]:
    """A package as the certificate has it."""
    return {"version": released, "source_sha256": source_hash(package)}


def version(package: str) -> str:
    """Of the distribution that a package is of; ``none`` for one that is run from a folder."""
    distributions = importlib.metadata.packages_distributions().get(package)
    try:
        return importlib.metadata.version(distributions[0]) if distributions else "none"
    except importlib.metadata.PackageNotFoundError:
        return "none"


def source_hash(package: str) -> str:
    """SHA-256 over the names and contents of the Python files of a package, or of a module that is one file."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return "none"
    # A folder without an __init__.py is a package too, of no file of its own.
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = {file.relative_to(folder): file for folder in folders for file in folder.rglob("*.py")}
    if not folders and spec.origin is not None:
        files = {Path(Path(spec.origin).name): Path(spec.origin)}
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        content = file.read_bytes()
        digest.update(f"{name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def git_commit(file: Path = Path(__file__)) -> str | None:
    """The commit of the code that runs, marked if it has been changed since; None where git does not keep it.

    A package that is installed into somebody's repository is none of its files.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=file.parent, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", file.name) is None or (commit := git("rev-parse", "HEAD")) is None:
        return None
    return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
