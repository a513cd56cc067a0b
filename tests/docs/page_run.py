"""Does what a page tells its reader to do, from top to bottom, in a folder of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pages
from forks import REPOSITORY
from pages import Command

# What is quick, and what a page may therefore have run.
QUICK = {"model=tiny", "debug=fast"}


def runs(command: Command) -> bool:
    """Whether a command of a page is run, and not only checked."""
    name, *words = command.words
    if name == "lightning-base" and words:
        return words[0] != "benchmark" and (words[0] != "train" or bool({*QUICK, "--cfg"} & set(words)))
    return name == "python" and words[0].endswith(".py") and not words[0].startswith("experiments/")


def write_files(page: Path, folder: Path) -> None:
    """The files that a page asks its reader to write."""
    for block in pages.blocks(page):
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.code)


def run(page: str, folder: str) -> None:
    """Runs the blocks in their order: Python in one namespace, commands as processes; compares what is shown of output.

    Raises:
        AssertionError: a command fails, or does not print what stands below it.
        Whatever the Python of the page raises, with the line of the page.
    """
    os.chdir(folder)
    sys.path.insert(0, folder)
    write_files(Path(page), Path(folder))
    names = {"__name__": "__main__"}
    printed: list[str] = []
    for block in pages.blocks(Path(page)):
        if block.skip or block.title:
            continue
        if block.kind == "python":
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)
        elif block.kind == "bash":
            printed = masked("".join(output(command) for command in pages.shell_commands(block) if runs(command)))
        elif block.kind == "text" and printed:
            missing = [line for line in masked(block.code) if line not in printed]
            assert missing == [], f"{block.place}: not in the output: {missing}"


def masked(text: str) -> list[str]:
    """Lines in which every number is the same."""
    return [re.sub(r"[\d.,]+", "#", re.sub(r"\s+", " ", line.strip())) for line in text.splitlines() if line.strip()]


def output(command: Command) -> str:
    """What a command prints, which has to end well."""
    own = command.environment.get("PYTHONPATH", "")
    start = ["-m", "lightning_base"] if command.words[0] == "lightning-base" else []
    done = subprocess.run(
        [sys.executable, *start, *command.words[1:]],
        env={**os.environ, **command.environment, "PYTHONPATH": f"{REPOSITORY}:{own}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command.place}: {' '.join(command.words)}\n{done.stdout}\n{done.stderr}"
    return f"{done.stdout}\n{done.stderr}\n"
