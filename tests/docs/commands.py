"""Checks a command of a page without what takes long: does it name what there is, and would it start?

``check`` knows make, this package's programs, pytest, pip and TensorBoard, and refuses what it does not know. The
command of a training run is composed by Hydra, and its jobs are checked as before a sweep; nothing of it is started.
What `make` would do is asked of `make -n`, and the programs it would call are checked in turn.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from itertools import takewhile
from pathlib import Path

from forks import REPOSITORY
from pages import Command

from lightning_base.instantiation import ConfigError
from lightning_base.program import entry

PROGRAMS = {*entry.PROGRAMS, "claims"}
PYTHON = ("python", "python3", ".venv/bin/python")
# What a name in runs/ stands for where no experiment of the repository has it: a page trains it by itself.
FOLDER = re.compile(r"(runs/)?[\w.-]+(/[\w.=,-]+)?")


class PageError(ValueError):
    """A command of a page would not do what the page says."""


def check(command: Command, own: Path, *, whole: bool = False) -> None:
    """Raises PageError if a command would not start.

    Args:
        command: a line of a shell.
        own: the folder that the page's own files were written to.
        whole: every value of a sweep and not its first job alone, and every program that make would call.
    """
    given = dict(command.environment)
    name, *rest = command.words
    if name == "srun":
        options = list(takewhile(lambda word: word.startswith("--"), rest))
        # srun tells each task where its nodes meet.
        given |= {"NODE_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
        name, *rest = rest[len(options) :]
    if name == "make":
        check_make(rest, own, whole=whole)
    elif name.removeprefix(".venv/bin/") == "lightning-base":
        check_program(rest[0] if rest else "--help", rest[1:], given, own, whole=whole)
    elif name in PYTHON and rest[:2] == ["-m", "pytest"]:
        check_paths(word for word in rest[2:] if "/" in word)
    elif name in PYTHON and rest[0].startswith("experiments/"):
        check_paths(rest[:1])
        check_program(Path(rest[0]).stem, rest[1:], given, own, whole=whole)
    elif name in PYTHON and rest[0].endswith(".py"):
        if not (own / rest[0]).is_file():
            raise PageError(f"{rest[0]} is no file")
    elif name.removeprefix(".venv/bin/") == "pip":
        check_pip(rest)
    elif name.removeprefix(".venv/bin/") == "tensorboard":
        if rest[:1] != ["--logdir"] or not FOLDER.fullmatch(rest[1]):
            raise PageError("tensorboard wants --logdir and a folder of runs")
    elif name.removeprefix(".venv/bin/") == "jupyter":
        check_paths(word for word in rest if "/" in word)
    elif (name, rest) not in (("source", [".venv/bin/activate"]), ("cd", ["lightning_base"])):
        raise PageError(f"{name} is no command that is understood")


def check_paths(paths: Sequence[str]) -> None:
    for path in paths:
        if not (REPOSITORY / path).exists():
            raise PageError(f"{path} is not there")


def check_make(rest: Sequence[str], own: Path, *, whole: bool) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = [word for word in rest if "=" not in word]
    for word in set(rest) - set(targets):
        if f"$({word.partition('=')[0]})" not in makefile and f"$({word.partition('=')[0]}," not in makefile:
            raise PageError(f"the Makefile has no variable {word.partition('=')[0]}")
    # A make that runs the tests hands its own variables on; the reader's shell has none.
    variables = {"MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", *re.findall(r"^(\w+) \?=", makefile, re.MULTILINE)}
    reader = {name: value for name, value in os.environ.items() if name not in variables}
    done = subprocess.run(
        ["make", "-n", *rest], cwd=REPOSITORY, env=reader, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise PageError(done.stderr.strip())
    if refused := re.search(r"^echo \"(error: .*?)\" && exit 2", done.stdout, re.MULTILINE):
        raise PageError(refused[1])
    for line in re.findall(r"^\s*\.venv/bin/python (experiments/.*)", done.stdout, re.MULTILINE) if whole else ():
        words = ("python", *shell_words(line))
        # Which launcher starts the jobs changes none of them: one is enough to see that it is there.
        jobs = tuple(word for word in words if not word.startswith("hydra/launcher="))
        try:
            check(Command("make", jobs), own, whole=True)
            check(Command("make", words), own, whole=jobs == words)
        except ConfigError as error:
            # Refused because it goes on from what another experiment leaves, which make has run before.
            found = re.search(r"=runs/(\w+)/", str(error))
            if found is None or not (REPOSITORY / "conf" / "experiment" / f"{found[1]}.yaml").is_file():
                raise


def shell_words(line: str) -> list[str]:
    """The first command of a shell line."""
    split = shlex.shlex(line, posix=True, punctuation_chars=";|&")
    split.whitespace_split = True
    return list(takewhile(lambda word: not set(word) <= set(";|&"), split))


def check_pip(rest: Sequence[str]) -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in rest:
        for extra in re.findall(r"\[([\w,]+)\]", word):
            if missing := set(extra.split(",")) - extras.keys():
                raise PageError(f"there is no extra {missing}")
    check_paths([word for word in rest if word.endswith(".txt")])


def check_program(name: str, arguments: Sequence[str], environment: dict[str, str], own: Path, *, whole: bool) -> None:
    if name not in PROGRAMS and name not in ("-h", "--help"):
        raise PageError(f"{name} is no program of lightning-base")
    folders = [word for word in arguments if not word.startswith("-")]
    if name == "train":
        check_train(tuple(arguments), tuple(environment.items()), own, whole=whole)
    elif name == "benchmark":
        from lightning_base.benchmark.command import parser

        with redirect_stderr(StringIO()) as said:
            try:
                parser().parse_args(arguments)
            except SystemExit:
                raise PageError(said.getvalue().strip()) from None
    elif name in ("report", "analysis", "export"):
        for folder in folders:
            check_folder(folder, own, run=name != "report", whole=whole)


def check_folder(folder: str, own: Path, *, run: bool, whole: bool) -> None:
    """A folder of runs, or of one run, that some experiment writes or that the page has trained."""
    if (own / folder).is_dir():
        return
    if not FOLDER.fullmatch(folder) or (run and folder.count("/") != 2):
        raise PageError(f"{folder} is not of the form {'runs/EXPERIMENT/JOB' if run else 'runs/EXPERIMENT'}")
    experiment, _, job = folder.removeprefix("runs/").partition("/")
    if (REPOSITORY / "conf" / "experiment" / f"{experiment}.yaml").is_file() and job and whole:
        jobs = check_train((f"experiment={experiment}", f"name={experiment}", "seed=1,2,3"), (), own, whole=True)
        if re.sub(r"seed=\d+$", "seed=1", job) not in jobs:
            raise PageError(f"experiment={experiment} has no job {job}; it has {', '.join(sorted(jobs))}")


@cache
def check_train(
    arguments: tuple[str, ...], environment: tuple[tuple[str, str], ...], own: Path, *, whole: bool
) -> list[str]:
    """Composes a command and checks its jobs; gives the names of their folders.

    Args:
        arguments: of the program.
        environment: what the command sets.
        own: the folder of the page's own files.
        whole: so many jobs that every value of a sweep is in one, with one seed; otherwise the first alone. A job costs
            a fifth of a second.

    Raises:
        Whatever the program would answer with exit code 2.
    """
    # Here, so that the process of the tests, whose imports are checked for shapes, need not load all of the program.
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from lightning_base.program import command, sweep
    from lightning_base.program.job import plain_config
    from lightning_base.program.plugins import offer_routers
    from lightning_base.program.read_config import check_loggers, read_config

    given = get_args_parser().parse_intermixed_args(arguments)
    GlobalHydra.instance().clear()
    given_environment = {"CUDA_VISIBLE_DEVICES": "", **dict(environment)}
    os.environ.update(given_environment)
    sys.path[:0] = [str(own / folder) for folder in given_environment.get("PYTHONPATH", "").split(":") if folder]
    overrides = list(given.overrides)
    if given.config_dir:
        overrides.append(f"hydra.searchpath=[file://{own / given.config_dir}]")
    if whole:
        overrides = [re.sub(r"^seed=(\d+),.*", r"seed=\1", override) for override in overrides]
    offer_routers(overrides, command.CONF / "router")
    with hydra.initialize_config_dir(str(command.CONF), version_base="1.3", job_name="train"):
        opened = GlobalHydra.instance().hydra
        assert opened is not None
        config = opened.compose_config("config", overrides, run_mode=RunMode.MULTIRUN)
        HydraConfig.instance().set_config(config)
        many = given.multirun or config.hydra.mode == RunMode.MULTIRUN
        sweeps = [written.input_line for written in sweep.written_overrides(config) if written.is_sweep_override()]
        if sweeps and not many:
            raise PageError(f"{sweeps[0]} needs -m")
        if not many:
            check_loggers(read_config(plain_config(config)).logger)
            return [Path(config.hydra.run.dir).name]
        sweep.check_plugins(config)
        if whole and sweep.jobs_are_known(config.hydra.sweeper._target_):
            seen: set[str] = set()
            combinations = [job for job in sweep.expand(config) if not seen.issuperset(job) and not seen.update(job)]
        else:
            combinations = [sweep.first_point(config)]
        return [sweep.check_job(config, combination)[2].path.name for combination in combinations]


def refusals(found: Iterable[Command], own: Path, *, whole: bool) -> list[str]:
    """A line for each command that would not start, with the reason; arguments as those of ``check``."""
    wrong = []
    for command in found:
        try:
            check(command, own, whole=whole)
        except Exception as error:  # whatever would have stopped the program
            wrong.append(f"{command.place}: {shlex.join(command.words)}\n  {type(error).__name__}: {error}")
    return wrong


def failures(found: Sequence[tuple[str, tuple[str, ...], dict[str, str]]], own: str, whole: bool) -> None:
    """Leaves with what is refused of commands, which are given by the arguments of ``Command``."""
    os.chdir(own)
    if wrong := refusals((Command(*fields) for fields in found), Path(own), whole=whole):
        raise SystemExit("\n".join(wrong))
