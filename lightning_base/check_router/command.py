"""The program ``check-router``."""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from rich.console import Console
from rich.markup import escape

from lightning_base.check_router.apart import Ended, call
from lightning_base.check_router.asked import ALL
from lightning_base.check_router.check import Outcome, outcome
from lightning_base.check_router.subject import Subject
from lightning_base.instantiation import ConfigError, did_you_mean, one_line, raised
from lightning_base.program.explain import BAD_INPUT
from lightning_base.program.plugins import declare, router_nodes

CONF = Path(__file__).parent.parent / "conf" / "router"
SECONDS = 30.0
# A router that has been ended so often is not asked for more: the whole should take about a minute.
TIMEOUTS = 2
# The solver is compiled on a new machine, which is nothing of the router's.
COMPILING_SECONDS = 300.0
COLOURS = {"ok": "green", "broken": "red", "not asked": "dim"}


def options_of(arguments: Iterable[str]) -> dict[str, Any]:
    """``key=value`` as on the command line of ``train``; ConfigError for anything else."""
    found = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"{argument} is no option: give the router's options as key=value")
        try:
            found[key.removeprefix("router.")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{argument} cannot be read: {' '.join(str(error).split())}") from error
    return found


def subject_of(name: str, options: Mapping[str, Any], plugins: Sequence[str], seconds: float) -> Subject:
    """The router that a name stands for: one of ours, an installed one, or ``package.module.Class``.

    Raises:
        ConfigError: there is none, it cannot be imported, or it cannot be checked.
    """
    ours = {file.stem: file for file in CONF.glob("*.yaml")}
    package = name.partition(".")[0]
    named = [] if "." not in name or package == "lightning_base" else [package]
    declare(dict.fromkeys([*plugins, *named]))
    if name in ours:
        node = yaml.safe_load(ours[name].read_text())
        target = node.pop("_target_")
    elif "." in name:
        node, target = {}, name
    else:
        installed = router_nodes(ours)
        if name not in installed:
            near = did_you_mean(name, {*ours, *installed})
            raise ConfigError(f"there is no router {name}, here or installed (name a class as package.Class){near}")
        node, target = {}, installed[name]
    subject = Subject(target, {**node, **options}, seconds)
    if not subject.kind.any_text:
        raise ConfigError(f"router={name} routes the text of one run alone, so that it cannot be given any other")
    return subject


def prepare(name: str, options: dict[str, Any], plugins: list[str], seconds: float) -> Subject | str:
    """The subject, once a router of it could be built; or the sentence that says why there is none."""
    quiet()
    try:
        subject = subject_of(name, options, plugins, seconds)
        subject.make()
    except ConfigError as error:
        return one_line(error)
    except Exception as error:  # of its __init__
        return f"{subject.target} cannot be built: {raised(error, subject.file)}"
    return subject


def compile_solver() -> None:
    """Solves a little; what Numba compiles for that is kept on disk."""
    import torch

    from lightning_base.assignment import balanced_assignment

    for k in (1, 2):
        balanced_assignment(torch.rand(32, 8), k=k)


def ask(name: str, subject: Subject, plugins: list[str]) -> Outcome:
    """What comes of one check, in a process that knows nothing yet."""
    quiet()
    declare(plugins)
    return outcome(next(check for check in ALL if check.name == name), subject)


def quiet() -> None:
    """What others warn of is not for whoever reads the sentences."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def run(subject: Subject, plugins: list[str], console: Console) -> int:
    """Asks every check and prints a line for each; gives how many are broken."""
    width, began, timeouts = max(len(check.name) for check in ALL), time.monotonic(), 0
    counts: dict[str, int] = {}
    for check in ALL:
        with console.status(f"{check.name}: {check.asks}"):
            if timeouts < TIMEOUTS:
                found = asked_apart(check.name, subject, plugins)
            else:
                found = Outcome("not asked", f"it had to be ended {timeouts} times before")
        timeouts += "still running" in found.sentence
        counts[found.verdict] = counts.get(found.verdict, 0) + 1
        line = f"[{COLOURS[found.verdict]}]{found.verdict:<9}[/]  {check.name:<{width}}  "
        console.print(line + escape(check.asks if found.verdict == "ok" else found.sentence), soft_wrap=True)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in COLOURS if verdict in counts)
    console.print(f"\n{subject.target}: {told}, in {time.monotonic() - began:.0f} s")
    if counts.get("broken", 0) > 1:
        console.print("mend the first that is broken first: what others say may come of it")
    return counts.get("broken", 0)


def asked_apart(name: str, subject: Subject, plugins: list[str]) -> Outcome:
    """The same as ``ask``, for a router that may never end, or end everything."""
    try:
        found: Outcome = call(ask, name, subject, plugins, seconds=subject.seconds)
    except TimeoutError:
        return Outcome(
            "broken",
            f"it was still running after {subject.seconds:g} s and was ended: give every loop a cap on its rounds",
        )
    except Ended as error:
        return Outcome("broken", f"{error}: a router may not end the process it runs in")
    return found


class Parser(argparse.ArgumentParser):
    """Answers a mistake in one line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line; gives the exit code: 0 if nothing is broken, 1 if something is, 2 for bad input."""
    parser = Parser(prog="check-router", description="Whether a router keeps what every router promises.")
    parser.add_argument("router", help="package.module.Class, the name of an installed router, or one of ours: base")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the router")
    parser.add_argument("--plugin", action="append", default=[], help="a package to import before; may be repeated")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for each check; {SECONDS:g} by default")
    given = parser.parse_intermixed_args(arguments)
    console = Console(highlight=False)
    try:
        options = options_of(given.options)
        with console.status("importing"):
            call(compile_solver, seconds=COMPILING_SECONDS)
            subject = call(prepare, given.router, options, given.plugin, given.seconds, seconds=2 * given.seconds)
        if isinstance(subject, str):
            raise ConfigError(subject)
        package = subject.target.partition(".")[0]
        return int(run(subject, [*given.plugin, *([package] if package != "lightning_base" else [])], console) > 0)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
    except (TimeoutError, Ended) as error:
        why = str(error) or f"that took more than {2 * given.seconds:g} s"
        print(f"error: {given.router} could not be imported and built: {why}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return BAD_INPUT
