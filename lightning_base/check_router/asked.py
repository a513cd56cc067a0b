"""All checks, in the order in which they are asked: what others rest on comes first."""

from dataclasses import dataclass
from typing import Any

from lightning_base.check_router.causality import causality
from lightning_base.check_router.check import Check
from lightning_base.check_router.construction import construction, initial_parameters, refusals
from lightning_base.check_router.edges import few_or_equal_tokens, not_a_number
from lightning_base.check_router.gradient import auxiliary_losses, gate_gradient
from lightning_base.check_router.groups import groups
from lightning_base.check_router.load import equal_loads, load, step_sums
from lightning_base.check_router.needs import needs
from lightning_base.check_router.padding import padding
from lightning_base.check_router.plan import empty_groups, plan
from lightning_base.check_router.precision import float64, mixed_precision
from lightning_base.check_router.ranks import accumulation, ranks
from lightning_base.check_router.recomputation import recomputation
from lightning_base.check_router.repetition import repetition
from lightning_base.check_router.state import state
from lightning_base.check_router.subject import Subject
from lightning_base.routing.router import Router

ALL: tuple[Check, ...] = (
    construction,
    refusals,
    initial_parameters,
    plan,
    empty_groups,
    repetition,
    groups,
    needs,
    causality,
    load,
    equal_loads,
    step_sums,
    padding,
    gate_gradient,
    auxiliary_losses,
    accumulation,
    ranks,
    recomputation,
    state,
    float64,
    mixed_precision,
    few_or_equal_tokens,
    not_a_number,
)

# After which two ranks that do not answer are ended; a machine that runs tests may be a busy one.
SECONDS = 120.0


@dataclass(frozen=True)
class Asked:
    """A check of a router, to be called without arguments; as text, the check's name."""

    check: Check
    subject: Subject

    def __call__(self) -> None:
        """Raises ``Broken``, which is an AssertionError, or ``NotAsked``, which pytest counts as skipped."""
        self.check(self.subject)

    def __str__(self) -> str:
        return self.check.name


def checks(router: type[Router] | str, **options: Any) -> list[Asked]:
    """Every check of a router with these options, for ``@pytest.mark.parametrize("check", checks(...), ids=str)``.

    Args:
        router: the class, or ``package.module.Class``.
        options: of its ``__init__``; ``num_experts`` is 8 unless given, or unless it has a default.
    """
    target = router if isinstance(router, str) else f"{router.__module__}.{router.__qualname__}"
    subject = Subject(target, options, seconds=SECONDS)
    return [Asked(check, subject) for check in ALL]
