"""A claim, the rule that judges it, and what came out. Rules are fixed here, before anything is run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from lightning_base.results.statistics import Interval

Rows = list[list[str]]


class Verdict(Enum):
    """What the numbers say of a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Judged:
    """One claim with its rule, the verdict by that rule, and the numbers.

    Args:
        title: the claim in a sentence.
        rule: when it holds, when it does not; otherwise it is undecided.
        verdict: by the rule.
        rows: a table with its heading first.
        conditions: under which this was measured.
        experiments: that the numbers come from.
    """

    title: str
    rule: str
    verdict: Verdict
    rows: Rows
    conditions: str
    experiments: Sequence[str] = field(default=())


def below(found: Interval, limit: float = 0.0) -> Verdict:
    """Holds where the whole interval is below the limit, fails where all of it is above."""
    if found.known and found.high < limit:
        return Verdict.HOLDS
    if found.known and found.low > limit:
        return Verdict.FAILS
    return Verdict.UNDECIDED


def above(found: Interval, limit: float = 0.0) -> Verdict:
    """Holds where the whole interval is above the limit, fails where all of it is below."""
    return {Verdict.HOLDS: Verdict.FAILS, Verdict.FAILS: Verdict.HOLDS}.get(below(found, limit), Verdict.UNDECIDED)


def within(found: Interval, limit: float) -> Verdict:
    """Holds where the whole interval is between -limit and limit, fails where it is all outside."""
    if not found.known:
        return Verdict.UNDECIDED
    if -limit < found.low and found.high < limit:
        return Verdict.HOLDS
    return Verdict.FAILS if found.low > limit or found.high < -limit else Verdict.UNDECIDED


def every(verdicts: Sequence[Verdict]) -> Verdict:
    """Holds if all do, fails if one does."""
    if Verdict.FAILS in verdicts:
        return Verdict.FAILS
    return Verdict.HOLDS if all(verdict is Verdict.HOLDS for verdict in verdicts) else Verdict.UNDECIDED


def signed(found: Interval, digits: int = 4) -> str:
    """``-0.0312 [-0.0401, -0.0223]``; with one seed the number alone."""
    text = f"{found.mean:+.{digits}f}"
    return f"{text} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]" if found.known else f"{text} (one seed)"


def plain(found: Interval, digits: int = 4) -> str:
    """``3.8312 ± 0.0089``, half the width of the interval; with one seed the number alone."""
    text = f"{found.mean:.{digits}f}"
    return f"{text} ± {found.margin:.{digits}f}" if found.known else text
