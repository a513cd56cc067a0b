"""Which runs may stand in one table: those that agree in everything but the router.

A run's *setting* is what has to agree: corpus, batches, initial weights, steps, tokens, packages, commit, device and
the configuration outside the router. Runs of one arm differ in their seed alone; two arms are compared where they have
the same seeds and, seed by seed, the same batches and initial weights.
"""

import re
from dataclasses import dataclass
from typing import Any

from lightning_base.report.flat import flatten
from lightning_base.report.read import Run

# The router's own side of the configuration: what a comparison is about.
ROUTER = (
    "router",
    "module.loss_coefficients",
    "module.router_init_scale",
    "module.router_learning_rate_factor",
)
# Names and places; they change nothing that is computed.
NAMING = (
    "name",
    "runs_dir",
    "data.cache_dir",
    "trainer.progress_bar",
    "trainer.record_plans",
    "trainer.keep_checkpoints",
    "logger",
)
# How the same numbers are computed: by how many processes and threads, in which portions. Only speed depends on it.
EXECUTION = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.accumulate_grad_batches",
    "trainer.threads",
    "data.num_workers",
    "strategy",
)
BY_SEED = ("batch_fingerprint", "initial_weights_fingerprint")
THREADS = re.compile(r", \d+ threads?$")


@dataclass(frozen=True)
class Arm:
    """One router with its options: a run per seed, in the order of the seeds."""

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def router(self) -> str:
        return str(self.first.ledger["router"])

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """Arms that may stand in one table, and the setting they share."""

    arms: tuple[Arm, ...]
    setting: dict[str, Any]

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.arms[0].seeds


@dataclass(frozen=True)
class Difference:
    """A field in which two settings differ, with both values."""

    field: str
    here: Any
    there: Any


def compare(runs: list[Run]) -> list[Comparison]:
    """Groups runs into comparisons: the one with the most arms first, then in the order of the runs."""
    arms: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        key = (_key(shared_setting(run)), _key(router_side(run)), _key(execution(run)))
        # The same arm with the same seed twice: a repetition, shown as an arm of its own.
        repeat = 0
        while any(other.seed == run.seed for other in arms.get((*key, repeat), [])):
            repeat += 1
        arms.setdefault((*key, repeat), []).append(run)
    groups: dict[str, list[Arm]] = {}
    for found in arms.values():
        arm = Arm(tuple(sorted(found, key=lambda run: run.seed)))
        groups.setdefault(_key(setting(arm)), []).append(arm)
    comparisons = [Comparison(tuple(found), setting(found[0])) for found in groups.values()]
    return sorted(comparisons, key=lambda comparison: -len(comparison.arms))


def shared_setting(run: Run) -> dict[str, Any]:
    """What has to agree between runs of any seed, by dotted key."""
    manifest = run.manifest
    found = {name: manifest[name] for name in ("corpus_fingerprint", "steps", "sequences", "tokens")}
    found |= {"git_commit": manifest.get("git_commit"), "python": manifest.get("python")}
    found["device"] = THREADS.sub("", manifest["device"])
    found |= {f"packages.{name}": version for name, version in manifest["packages"].items()}
    return found | {
        key: value
        for key, value in flatten(run.config).items()
        if not under(key, (*ROUTER, *NAMING, *EXECUTION, "seed"))
    }


def setting(arm: Arm) -> dict[str, Any]:
    """What has to agree between arms: the shared setting, the seeds, and what depends on each seed."""
    found = {**shared_setting(arm.first), "seed": list(arm.seeds)}
    return found | {name: {run.seed: run.manifest[name] for run in arm.runs} for name in BY_SEED}


def router_side(run: Run) -> dict[str, Any]:
    """The router's options and the coefficients of its losses: what may differ between arms."""
    chosen = {key: value for key, value in flatten(run.config).items() if under(key, ROUTER)}
    return chosen | flatten({"loss_coefficients": run.ledger.get("loss_coefficients") or {}})


def execution(run: Run) -> dict[str, Any]:
    """What changes the speed of a run and not its numbers."""
    chosen = {key: value for key, value in flatten(run.config).items() if under(key, EXECUTION)}
    return chosen | {"world_size": run.manifest["world_size"], "device": run.manifest["device"]}


def differences(one: Comparison, other: Comparison) -> list[Difference]:
    """The fields in which two comparisons differ; those that somebody configured come first.

    What depends on the seed is compared for the seeds that both have.
    """
    keys = sorted({*one.setting, *other.setting}, key=lambda key: (not is_configured(one, other, key), key))
    found = []
    for key in keys:
        here, there = one.setting.get(key), other.setting.get(key)
        if key not in BY_SEED:
            found.append(Difference(key, here, there))
            continue
        shared = sorted(set(one.seeds) & set(other.seeds))
        for seed in shared:
            field = key if len(shared) == 1 else f"{key} (seed {seed})"
            found.append(Difference(field, one.setting[key][seed], other.setting[key][seed]))
    return [difference for difference in found if difference.here != difference.there]


def is_configured(one: Comparison, other: Comparison, key: str) -> bool:
    return any(key in flatten(comparison.arms[0].first.config) for comparison in (one, other))


def unequal(arms: tuple[Arm, ...], name: str, tolerance: float = 0.01) -> bool:
    """Whether a cost of the ledger differs between arms by more than a share of the smallest."""
    costs = [float(arm.first.ledger[name]) for arm in arms]
    return max(costs) > (1 + tolerance) * min(costs)


def under(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _key(found: dict[str, Any]) -> str:
    return repr(sorted(found.items()))
