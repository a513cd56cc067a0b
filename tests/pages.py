"""The pages of the documentation as blocks of code, and what kind of thing each block is."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

from forks import REPOSITORY

# What a fence may say. ``text`` is for formulas, drawings and what a program prints.
KINDS = ("python", "bash", "yaml", "toml", "text")
FENCE = re.compile(r"^(?P<fence>```+)(?P<kind>[^\s`]*)(?: +title=\"(?P<title>[^\"]+)\")?(?P<rest>[^\n]*)$")
SKIP = re.compile(r"<!-- not run: (?P<reason>.*?) ?-->")
ASSIGNMENT = re.compile(r"[A-Z_]+=.*")
# A span of text like this is a command too.
COMMAND = re.compile(r"`((?:make|lightning-base|(?:\.venv/bin/)?python) [^`]+)`")


@dataclass(frozen=True)
class Block:
    """One block of code.

    Args:
        page: the file it stands in.
        line: of its first line of code, from 1.
        kind: what its fence says.
        code: what is between the fences.
        title: the file that it is, if any: ``title="my_router.py"`` behind the kind.
        skip: the reason of a marker ``<!-- not run: reason -->`` on the line before the fence.
    """

    page: Path
    line: int
    kind: str
    code: str
    title: str = ""
    skip: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell block, or of a span of text that is one."""

    place: str
    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, place: str, line: str) -> "Command | None":
        """A line of a shell; None for a comment."""
        words = shlex.split(line, comments=True)
        given = dict(word.split("=", 1) for word in takewhile(ASSIGNMENT.fullmatch, words))
        return cls(place, tuple(words[len(given) :]), given) if words else None

    def fields(self) -> tuple[str, tuple[str, ...], dict[str, str]]:
        """For another process."""
        return self.place, self.words, self.environment


def pages() -> list[Path]:
    """Every page that is read: those at the top of the repository and those of the site."""
    found = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    return sorted(path for path in found if not path.is_symlink())


def blocks(page: Path) -> list[Block]:
    """The blocks of a page from top to bottom.

    Raises:
        ValueError: a fence that is not closed, or that says more than is understood.
    """
    found: list[Block] = []
    open_block: Block | None = None
    fence, before = "", ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if open_block is not None:
            if line.strip() == fence:
                found.append(open_block)
                open_block = None
            else:
                open_block = replace(open_block, code=f"{open_block.code}{line}\n")
        elif match := FENCE.match(line):
            if match["rest"].strip():
                raise ValueError(f"{page}:{number}: {line} says more than a kind and a title")
            skip = SKIP.search(before)
            fence = match["fence"]
            reason = skip["reason"] if skip else ""
            open_block = Block(page, number + 1, match["kind"], "", match["title"] or "", reason)
        if line.strip():
            before = line
    if open_block is not None:
        raise ValueError(f"{open_block.place}: the block is not closed")
    return found


def python_program(page: Path, without: str | None = None) -> str:
    """The Python blocks of a page as one program, other lines blank, so that a traceback has the line of the page.

    Args:
        page: whose blocks; those that are a file, or marked as not run, are left out.
        without: blocks that hold this text are left out too.
    """
    lines = [""] * len(page.read_text().splitlines())
    for block in blocks(page):
        if block.kind == "python" and not block.title and not block.skip and not (without and without in block.code):
            code = block.code.splitlines()
            lines[block.line - 1 : block.line - 1 + len(code)] = code
    return "\n".join(lines) + "\n"


def shell_commands(block: Block) -> list[Command]:
    """The commands of a shell block, without its comments."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := Command.of(block.place, line))]


def spans(page: Path) -> Iterator[Command]:
    """The commands that stand in the text of a page between backticks."""
    fenced = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    text = fenced.sub(lambda block: "\n" * block[0].count("\n"), page.read_text())
    for match in COMMAND.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if command := Command.of(f"{page.relative_to(REPOSITORY)}:{line}", match[1].replace("\n", " ")):
            yield command
