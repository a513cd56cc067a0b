"""Ratios of a new run against those of a committed one: names what got worse than the noise of both."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lightning_base.benchmark.record import Record, key

LEAST = 0.15  # what a quiet machine may differ from another quiet one
SPREADS = 3.0  # quartile distances beyond which a difference is no noise
SMALLEST = 0.01  # shares of a step below this are not worth an alarm
GROSS = 2.0  # times the baseline: what even a busy machine does not do by noise


@dataclass(frozen=True)
class Change:
    """A ratio that got worse.

    Args:
        now: the record of the new run.
        before: the baseline's.
        worse: by what factor.
        allowed: the factor that noise explains.
    """

    now: Record
    before: Record
    worse: float
    allowed: float

    def __str__(self) -> str:
        name = ", ".join(key(self.now))
        return (
            f"{name}: {self.now['ratio']:g} where the baseline has {self.before['ratio']:g}, "
            f"{self.worse:.2f} times worse; noise explains {self.allowed:.2f}"
        )


def regressions(now: Iterable[Record], baseline: Iterable[Record], *, gross: bool = False) -> list[Change]:
    """What got worse by more than noise, the worst first.

    Args:
        now: the new run's records; those that the baseline lacks are not compared.
        baseline: the committed records.
        gross: only what is ``GROSS`` times worse, for a machine that others use.
    """
    found = [
        change
        for change in changes(now, baseline)
        if change.worse > (max(GROSS, change.allowed) if gross else change.allowed)
    ]
    return sorted(found, key=lambda change: -change.worse)


def changes(now: Iterable[Record], baseline: Iterable[Record]) -> Iterator[Change]:
    """Every ratio that both runs have."""
    known = {key(record): record for record in baseline}
    for record in now:
        before = known.get(key(record))
        if before is not None and record.get("compared", True) and max(record["ratio"], before["ratio"]) >= SMALLEST:
            yield Change(record, before, worsening(record, before), 1 + noise(record, before))


def worsening(record: Record, before: Record) -> float:
    """By what factor a ratio got worse; shares near zero are taken as at least ``SMALLEST``."""
    new, old = (max(one["ratio"], SMALLEST) for one in (record, before))
    return new / old if record["better"] == "lower" else old / new


def noise(record: Record, before: Record) -> float:
    """The relative difference that the spread of the two runs explains."""
    widths = [(one["high"] - one["low"]) / max(one["ratio"], SMALLEST) for one in (record, before)]
    return max(LEAST, SPREADS * max(widths) / 2)


def missing(now: Sequence[Record], baseline: Sequence[Record], subjects: Iterable[str]) -> list[str]:
    """Measurements of these subjects that the baseline has and the new run has not."""
    have = {key(record) for record in now}
    wanted = set(subjects)
    return [", ".join(key(record)) for record in baseline if record["subject"] in wanted and key(record) not in have]
