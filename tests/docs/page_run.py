"""Does what a page tells its reader to do, from top to bottom, in a folder of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands
import pages
from forks import REPOSITORY
from pages import Block, Command

# What is quick, and what a page may therefore have run: tiny models, and few steps of others.
QUICK = re.compile(r"model=tiny|debug=fast|--cfg|trainer\.max_steps=\d")


def runs(command: Command) -> bool:
    """Whether a command of a page is run, and not only checked."""
    name, *words = command.words
    if name == "lightning-base" and words:
        return words[0] != "benchmark" and (words[0] != "train" or any(map(QUICK.fullmatch, words)))
    # Programs and tests that the page has its reader write.
    return name == "python" and words[-1].endswith(".py") and "/" not in words[-1]


def write(block: Block) -> None:
    """Writes the file that a page asks its reader to write."""
    Path(block.title).parent.mkdir(parents=True, exist_ok=True)
    Path(block.title).write_text(block.code)


def execute(block: Block, names: dict[str, Any]) -> None:
    """Runs Python, so that a traceback has the line of the page."""
    exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), names)


def check(page: str, folder: str, whole: bool) -> None:
    """Checks the commands of a page and runs none; the Python above a command has to run, for what it leaves.

    Args:
        page: its file.
        folder: for what the page writes.
        whole: as in ``commands.check``.
    """
    os.chdir(folder)
    sys.path.insert(0, folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    waiting: list[Block] = []
    wrong: list[str] = []
    for block in pages.blocks(Path(page)):
        if block.title:
            write(block)
        elif block.kind == "python" and not block.skip:
            waiting.append(block)
        elif block.kind == "bash" and not block.skip:
            for above in waiting:
                execute(above, names)
            waiting = []
            wrong += commands.refusals(pages.shell_commands(block), Path(folder), whole=whole)
    if wrong:
        raise SystemExit("\n".join(wrong))


def run(page: str, folder: str) -> None:
    """Runs the blocks in their order: Python in one namespace, commands as processes; compares what is shown of output.

    Raises:
        AssertionError: a command fails, or does not print what stands below it.
        Whatever the Python of the page raises, with the line of the page.
    """
    os.chdir(folder)
    sys.path.insert(0, folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    printed: list[str] = []
    found = pages.blocks(Path(page))
    for i, block in enumerate(found):
        if block.title:
            write(block)
        elif block.skip:
            continue
        elif block.kind == "python":
            execute(block, names)
        elif block.kind == "bash":
            # A page may show what is wrong with something.
            fails = found[i + 1 :] and found[i + 1].kind == "text" and "broken " in found[i + 1].code
            now = [output(command, int(bool(fails))) for command in pages.shell_commands(block) if runs(command)]
            printed = masked("".join(now))
        elif block.kind == "text" and printed:
            missing = [line for line in masked(block.code) if line not in printed]
            assert missing == [], f"{block.place}: not in the output: {missing}"


def masked(text: str) -> list[str]:
    """Lines in which every number is the same."""
    return [re.sub(r"[\d.,]+", "#", re.sub(r"\s+", " ", line.strip())) for line in text.splitlines() if line.strip()]


def output(command: Command, code: int = 0) -> str:
    """What a command prints, which has to end with an exit code."""
    own = command.environment.get("PYTHONPATH", "")
    start = ["-m", "lightning_base"] if command.words[0] == "lightning-base" else []
    done = subprocess.run(
        [sys.executable, *start, *command.words[1:]],
        env={**os.environ, **command.environment, "PYTHONPATH": f"{REPOSITORY}:{own}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, f"{command.place}: {' '.join(command.words)}\n{done.stdout}\n{done.stderr}"
    return f"{done.stdout}\n{done.stderr}\n"
