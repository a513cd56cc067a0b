"""What a check of routers is, and what can come of asking one."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from unittest import SkipTest

from lightning_base.check_router.subject import Subject
from lightning_base.instantiation import raised


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
        return Outcome("broken", raised(error, subject.file))
    return Outcome("ok")
