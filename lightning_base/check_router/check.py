"""What a check of routers is, and what can come of asking one."""

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from unittest import SkipTest

from lightning_base.check_router.subject import Subject


class Broken(AssertionError):  # noqa: N818 - it reads as a verdict
    """One sentence: what the router was given, what came out, what should have, and what would do."""


class NotAsked(SkipTest):
    """The reason why a check has no meaning for a router; pytest and unittest count it as skipped."""


@dataclass(frozen=True)
class Check:
    """One thing that every router promises.

    Args:
        name: of the function that asks.
        asks: a sentence, the first line of its docstring.
        function: raises ``Broken`` or ``NotAsked``.
    """

    name: str
    asks: str
    function: Callable[[Subject], None]

    def __call__(self, subject: Subject) -> None:
        self.function(subject)


@dataclass(frozen=True)
class Outcome:
    """What came of a check: ``ok``, ``broken`` or ``not asked``, and, but for the first, a sentence."""

    verdict: str
    sentence: str = ""


def check(function: Callable[[Subject], None]) -> Check:
    """A check from the function that asks it."""
    asks = (inspect.getdoc(function) or "").partition("\n")[0]
    return Check(function.__name__.replace("_", " "), asks, function)


def outcome(asked: Check, subject: Subject) -> Outcome:
    """Asks; whatever the router raises is an outcome too."""
    try:
        asked(subject)
    except NotAsked as reason:
        return Outcome("not asked", str(reason))
    except Broken as broken:
        return Outcome("broken", str(broken))
    except Exception as error:  # whatever its author has written
        return Outcome("broken", raised(error, subject))
    return Outcome("ok")


def raised(error: BaseException, subject: Subject) -> str:
    """The sentence for an error of the router's own, with the line of its file."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename == subject.file]
    where = f" (line {theirs[-1].lineno} of {theirs[-1].filename})" if theirs else ""
    message = " ".join(str(error).split()) or "without a message"
    return "; ".join([f"it raised {type(error).__name__}: {message}{where}", *getattr(error, "__notes__", ())])
