"""What arms and comparisons are called: by what tells them apart."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from lightning_base.results.fairness import (
    EXECUTED,
    ROUTER,
    ROUTER_SOURCES,
    Arm,
    Comparison,
    setting,
    shared_setting,
    varying,
)
from lightning_base.results.read import Run, flatten


def labelled(comparison: Comparison) -> Comparison:
    """With one label per arm, no two alike: the sweep's own, with the router's name, and more where needed."""
    arms = [replace(arm, label=shorten(arm)) for arm in comparison.arms]
    for names in (EXECUTED, ROUTER):
        arms = [replace(arm, label=arm.label + told_apart(arm, arms, names)) for arm in arms]
    labels = [arm.label for arm in arms]
    folders = {arm: f" [{'/'.join(arm.first.path.parts[-2:])}]" for arm in arms if labels.count(arm.label) > 1}
    return replace(comparison, arms=tuple(replace(arm, label=arm.label + folders.get(arm, "")) for arm in arms))


def shorten(arm: Arm) -> str:
    """The label that the sweep gave, without what its table shares: ``switch, capacity_factor=1.0``."""
    run = arm.first
    # What all arms of a table share is in its title.
    shared = {"seed", *shared_setting(run)}
    own = [part.strip() for part in run.label.split(",") if part.partition("=")[0].strip() not in shared]
    kept = [part.removeprefix("router.").removeprefix("router=").removeprefix("arm=") for part in own]
    if run.label == run.path.name or not any(kept):
        # Not from a sweep: the folder is named after all overrides, which say little about the arm.
        return router_name(arm)
    return ", ".join(kept if any("=" not in part for part in kept) else [router_name(arm), *kept])


def router_name(arm: Arm) -> str:
    """The router; one that repeats another run is named after that run, by experiment and job."""
    source = arm.first.config["router"].get("source")
    if source is None:
        return arm.router
    # A folder is named after all overrides of its job, the router's first.
    experiment, job = Path(source).parts[-2:]
    return f"{arm.router} of {experiment}/{job.partition(',')[0]}"


def told_apart(arm: Arm, arms: Sequence[Arm], names: tuple[str, ...]) -> str:
    """The fields under some names that differ among the arms with this arm's label, in brackets.

    ``switch`` from one sweep and ``Switch`` from another command are one label.
    """
    alike = [other.first.chosen(names) for other in arms if other.label.lower() == arm.label.lower()]
    fields = arm.first.fields
    mine = [f"{key.rpartition('.')[2]}={short(fields[key])}" for key in varying(alike) if key in fields]
    return f" ({', '.join(mine)})" if mine else ""


def comparison_titles(comparisons: Sequence[Comparison]) -> list[str]:
    """What is particular to each comparison: the configured keys that vary, or else the other fields that do."""
    settings = [comparison.setting for comparison in comparisons]
    keys = varying(settings)
    chosen = [key for key in keys if is_configured(comparisons, key)] or keys
    more = f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
    return [", ".join(f"{key} = {short(setting.get(key))}" for key in chosen[:3]) + more for setting in settings]


def apart(comparison: Comparison, first: Comparison) -> Iterator[str]:
    """The fields in which a comparison is not the first one, with both values; those that somebody configured first.

    What depends on the seed is compared for the seeds that both have.
    """
    pair, shared = (comparison, first), set(comparison.seeds) & set(first.seeds)
    here, there = ({**setting(one.arms, shared), "seed": list(one.seeds)} for one in pair)
    for key in sorted(varying((here, there)), key=lambda key: not is_configured(pair, key)):
        values = here.get(key), there.get(key)
        mine, theirs = map(short if short(values[0]) != short(values[1]) else str, values)
        yield f"{key}: {mine} here, {theirs} in the first table"
    yield from changed_sources(product(comparison.arms, first.arms))


def changed_sources(pairs: Iterable[tuple[Arm, Arm]]) -> Iterator[str]:
    """Which of these arms are one router, of a plugin that was changed in between."""
    for arm, other in pairs:
        here, there = (run.chosen(("router",)) for run in (arm.first, other.first))
        mine, theirs = (listed(packages(run, ROUTER_SOURCES)) for run in (arm.first, other.first))
        if here == there and mine != theirs:
            yield f"{arm.label} is of {mine or 'an unknown source'}, {other.label} of {theirs or 'an unknown source'}"


def packages(run: Run, within: str = "sources") -> list[str]:
    """The code that a run was made with: ``my_router 1.2 (3f2a…)``."""
    found = run.chosen((within,))
    texts = {
        f"{key.split('.')[-2]} {value} ({short(found[key.replace('.version', '.source_sha256')])})"
        for key, value in found.items()
        if key.endswith(".version")
    }
    return sorted(texts)


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``; nothing for nothing."""
    return " and ".join([", ".join(items[:-1]), *items[-1:]] if len(items) > 1 else items)


def is_configured(comparisons: Sequence[Comparison], key: str) -> bool:
    return any(key in flatten(comparison.arms[0].first.config) for comparison in comparisons)


def short(value: Any) -> str:
    """A value for a sentence; fingerprints and commits by their first digits."""
    if isinstance(value, dict):
        return ", ".join(map(short, value.values()))
    text = ", ".join(map(short, value)) if isinstance(value, list) else str(value)
    digits, dirty, _ = text.partition("-dirty")
    if len(digits) >= 32 and not set(digits) - set("0123456789abcdef"):
        return f"{digits[:12]}…{dirty}"
    return "nothing" if value is None else text
