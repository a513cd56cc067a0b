"""What arms and comparisons are called: by what tells them apart."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_base.report.fairness import Arm, Comparison, execution, is_configured, router_side, shared_setting


def labelled(comparison: Comparison) -> Comparison:
    """With one label per arm, no two alike: the sweep's own, with the router's name, and more where needed."""
    labels = [shorten(arm) for arm in comparison.arms]
    for describe in (execution, router_side):
        labels = tell_apart(labels, [describe(arm.first) for arm in comparison.arms])
    labels = [
        f"{label} [{arm.first.path.parent.name}/{arm.first.name}]" if labels.count(label) > 1 else label
        for label, arm in zip(labels, comparison.arms, strict=True)
    ]
    arms = (replace(arm, label=label) for label, arm in zip(labels, comparison.arms, strict=True))
    return replace(comparison, arms=tuple(arms))


def shorten(arm: Arm) -> str:
    """The label that the sweep gave, without what its table shares: ``switch, capacity_factor=1.0``."""
    parts = [part.strip() for part in arm.first.label.split(",")]
    # What all arms of a table share is in its title.
    shared = {"seed", *shared_setting(arm.first)}
    own = [part for part in parts if part.partition("=")[0] not in shared]
    kept = [part.removeprefix("router.").removeprefix("router=").removeprefix("arm=") for part in own]
    if arm.first.label == arm.first.name or not any(kept):
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


def tell_apart(labels: list[str], descriptions: list[dict[str, Any]]) -> list[str]:
    """Adds to labels that occur more than once the described values that differ among their arms.

    ``switch`` from one sweep and ``Switch`` from another command are one label.
    """
    found = []
    for label, mine in zip(labels, descriptions, strict=True):
        same = [d for name, d in zip(labels, descriptions, strict=True) if name.lower() == label.lower()]
        differing = sorted(key for key in mine if any(other.get(key) != mine[key] for other in same))
        extra = ", ".join(f"{key.rpartition('.')[2]}={mine[key]}" for key in differing)
        found.append(f"{label} ({extra})" if extra else label)
    return found


def comparison_titles(comparisons: Sequence[Comparison]) -> list[str]:
    """What is particular to each comparison: the configured keys that vary, or else the other fields that do."""
    settings = [comparison.setting for comparison in comparisons]
    keys = sorted({key for setting in settings for key in setting})
    varying = [key for key in keys if len({repr(setting.get(key)) for setting in settings}) > 1]
    chosen = [key for key in varying if is_configured(comparisons, key)] or varying
    more = f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
    return [", ".join(f"{key} = {short(setting.get(key))}" for key in chosen[:3]) + more for setting in settings]


def short(value: Any) -> str:
    """A value for a sentence; fingerprints and commits by their first digits."""
    if isinstance(value, dict):
        return ", ".join(map(short, value.values()))
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    digits, dirty, _ = text.partition("-dirty")
    if len(digits) >= 32 and not set(digits) - set("0123456789abcdef"):
        return f"{digits[:12]}…{dirty}"
    return "nothing" if value is None else text
