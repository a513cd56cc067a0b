"""Every code block of every page does what the page says.

Python runs, page by page. Commands are checked without what takes long (commands.py says how). In the long form those
that train something small, or nothing, run too (page_run.py says which): from top to bottom, in a folder for the page,
and what the page shows of their output has to be there. A block with ``title="..."`` is a file in that folder.
The one way out is ``<!-- not run: reason -->`` in front of a block.
"""

import ast
import re
import tomllib
from pathlib import Path

import commands
import forks
import page_run
import pages
import pytest
import yaml
from forks import REPOSITORY
from omegaconf import OmegaConf
from pages import Block, Command

PAGES = {str(page.relative_to(REPOSITORY)): page for page in pages.pages()}
BLOCKS = {name: pages.blocks(page) for name, page in PAGES.items()}
LONG_PYTHON = "torch.compile"
SHELL = {
    name: [
        command for block in found if block.kind == "bash" and not block.skip for command in pages.shell_commands(block)
    ]
    for name, found in BLOCKS.items()
}
RUN = [name for name, found in SHELL.items() if any(page_run.runs(command) for command in found)]
PYTHON = [name for name, page in PAGES.items() if pages.python_program(page).strip()]


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    wrong = []
    for block in (block for found in BLOCKS.values() for block in found):
        if block.kind not in pages.KINDS:
            wrong.append(
                f"{block.place}: a block of {block.kind or 'no kind'}; one of {', '.join(pages.KINDS)} would do"
            )
        if block.kind == "text" and re.match(r"(make|lightning-base|python|\.venv|pip|import|from) ", block.code):
            wrong.append(f"{block.place}: this looks as if it could be run")
        if block.title and (Path(block.title).is_absolute() or ".." in Path(block.title).parts):
            wrong.append(f"{block.place}: the file {block.title} is not in the reader's folder")
    assert wrong == []


def test_no_block_hides_in_an_indentation() -> None:
    """Markdown takes an indented paragraph for code; such a block has no kind."""
    hidden = [
        f"{name}: {match[0].strip()}"
        for name, page in PAGES.items()
        for match in re.finditer(r"(?:^|\n)(?![ *\d-])[^\n]*\n\n {4}\S[^\n]*", strip_blocks(page))
    ]
    assert hidden == []


def strip_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def parsed(block: Block) -> None:
    if block.kind == "python":
        ast.parse(block.code)
    elif block.kind == "toml":
        tomllib.loads(block.code)
    elif block.kind == "yaml":
        yaml.safe_load(block.code)


def test_what_can_be_parsed_is() -> None:
    for block in (block for found in BLOCKS.values() for block in found):
        try:
            parsed(block)
        except (SyntaxError, yaml.YAMLError, tomllib.TOMLDecodeError) as error:
            pytest.fail(f"{block.place}: {error}")


def configurations(found: list[tuple[str, str]]) -> None:
    """Raises for a configuration that would be refused; in a process that has imported the program."""
    from hydra import compose, initialize_config_dir

    from lightning_base.instantiation import resolve
    from lightning_base.program import command
    from lightning_base.program.job import plain_config
    from lightning_base.program.read_config import read_config

    for place, text in found:
        given = OmegaConf.create(text)
        assert OmegaConf.is_dict(given), f"{place}: no configuration"
        if "_target_" in given:
            if ".my_" not in given["_target_"]:
                resolve(given["_target_"], place, object)
            continue
        with initialize_config_dir(str(command.CONF), version_base="1.3"):
            config = compose("config", return_hydra_config=True)
        OmegaConf.set_struct(config, True)
        read_config(plain_config(OmegaConf.merge(config, given)))


def test_configurations_would_be_accepted() -> None:
    """One with a title is a file, which the commands of its page name."""
    found = [
        (block.place, block.code)
        for blocks in BLOCKS.values()
        for block in blocks
        if block.kind == "yaml" and not block.title
    ]
    forks.call(configurations, found)


@pytest.mark.parametrize("name", [name for name in PYTHON if name not in RUN])
def test_the_python_of_a_page_runs(name: str, tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text(pages.python_program(PAGES[name], without=LONG_PYTHON))
    done = forks.run(["page.py"], folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name, found in SHELL.items() if found])
def test_the_commands_of_a_page_would_start(name: str, tmp_path: Path) -> None:
    forks.call(page_run.check, str(PAGES[name]), str(tmp_path), False)


WRONG = {
    "make no_such_target": "No rule to make target",
    "make experiment EXPERIMEN=gate": "the Makefile has no variable EXPERIMEN",
    "make ablation": "say which",
    "lightning-base trane": "trane is no program",
    "lightning-base train router=bse": "router/bse",
    "lightning-base train router=base,switch": "needs -m",
    "lightning-base train -m router=base,switch trainer.max_step=4": "max_step",
    "lightning-base train strategy=ddp trainer.devices=3": "cannot be divided",
    "lightning-base analysis runs/compare": "runs/EXPERIMENT/JOB",
    "lightning-base benchmark layers": "invalid choice",
    "python experiments/no_such_program.py": "is not there",
    "python -m pytest tests/no_such_folder": "is not there",
    "pip install -e '.[no_such_extra]'": "no_such_extra",
    "rm -rf runs": "no command that is understood",
}


def test_a_command_that_would_not_start_is_found(tmp_path: Path) -> None:
    found = [command.fields() for line in WRONG if (command := Command.of(line, line))]
    process = forks.start_function(commands.failures, found, str(tmp_path), False)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    # A line for each, and the reason after it.
    parts = {line: errors.partition(f"{line}: ")[2][:2000] for line in WRONG}
    assert {line: parts[line] for line, reason in WRONG.items() if reason not in parts[line]} == {}


@pytest.mark.exhaustive
def test_all_jobs_of_all_commands_and_of_those_in_the_text_would_start(tmp_path: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    together = []
    for name, page in PAGES.items():
        # The changelog tells of what was.
        spans = [span for span in pages.spans(page) if not is_a_form(span.words) and name != "CHANGELOG.md"]
        targets = [span.words[1] for span in spans if is_a_target(span.words)]
        assert [target for target in targets if f"\n{target}:" not in makefile] == [], name
        together += [span for span in spans if not is_a_target(span.words)]
        if name in RUN or any(block.title for block in BLOCKS[name]):
            (tmp_path / name).mkdir(parents=True)
            forks.call(page_run.check, str(PAGES[name]), str(tmp_path / name), True)
        else:
            together += SHELL[name]
    # In one process, which checks equal commands once.
    forks.call(commands.failures, [command.fields() for command in together], str(tmp_path), True, timeout=550)


def is_a_form(words: tuple[str, ...]) -> bool:
    """Whether a command in the text stands for many: ``RUN=...``, ``a|b`` or a name that the reader gives."""
    return any("..." in word or "|" in word or "my_router" in word or word.isupper() for word in words)


def is_a_target(words: tuple[str, ...]) -> bool:
    """Whether a command in the text is the name of a target alone, which may need to be told more."""
    return words[0] == "make" and len(words) == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", RUN)
def test_a_page_runs_from_top_to_bottom(name: str, tmp_path: Path) -> None:
    forks.call(page_run.run, str(PAGES[name]), str(tmp_path), timeout=550)
