"""Which runs may stand in one table: those that agree in everything but the router.

A run's *setting* is what has to agree: corpus, batches, initial weights, steps, tokens, packages, commit, device and
the configuration outside the router. Runs of one arm differ in their seed alone; arms stand in one table if they share
a seed and have, seed by seed, the same batches and initial weights. Differences are over the seeds two arms share.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_base.program.run_directory import EXECUTION
from lightning_base.report.read import Run, flatten

# The router's own side of the configuration: what a comparison is about.
ROUTER = (
    "router",
    "module.loss_coefficients",
    "module.router_init_scale",
    "module.router_learning_rate_factor",
    "model.shuffle_tokens",
)
# Names and places; they change nothing that is computed.
NAMING = (
    "name",
    "runs_dir",
    "resume",
    "plugins",
    "data.cache_dir",
    "trainer.progress_bar",
    "trainer.record_plans",
    "trainer.keep_checkpoints",
    "logger",
)
# Of this package, they look on.
CALLBACKS = "lightning_base.callbacks."
BY_SEED = ("batch_fingerprint", "initial_weights_fingerprint")
THREADS = re.compile(r", \d+ threads?$")


@dataclass(frozen=True)
class Arm:
    """One router with its options: a run per seed, in the order of the seeds, and what tells it from other arms."""

    runs: tuple[Run, ...]
    label: str = ""

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def router(self) -> str:
        return str(self.first.ledger["router"])

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def modes(self) -> list[str]:
        """The ways in which the validation text was routed; the first one counts."""
        return list(self.first.ledger["evaluation_modes"])

    @property
    def sparse(self) -> bool:
        """Whether there is anything to route between."""
        return bool(self.first.ledger["num_experts"] > 1)

    @property
    def straight_through(self) -> bool:
        """Whether it is declared to learn from another gradient than that of its gates' values."""
        return bool(self.first.ledger.get("straight_through", False))

    @property
    def causal(self) -> bool:
        """Whether its validation loss is that of a language model, which does not look at later tokens."""
        return self.causal_in(self.modes[0])

    def causal_in(self, mode: str | None) -> bool:
        """Whether a way of routing never looks at later tokens; None is training."""
        ledger = self.first.ledger
        return bool(ledger["causal_in_training"] if mode is None else ledger["evaluation_modes"][mode])


@dataclass(frozen=True)
class Comparison:
    """Arms that may stand in one table, and the setting they share."""

    arms: tuple[Arm, ...]
    setting: dict[str, Any]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every seed that an arm has."""
        return tuple(self.setting["seed"])

    @property
    def reference(self) -> int:
        """The arm that others are held against: the one with one expert, or else the first that may be ranked."""
        ranked = [i for i, arm in enumerate(self.arms) if arm.causal]
        return next((i for i in ranked if not self.arms[i].sparse), ranked[0] if ranked else 0)


def compare(runs: list[Run]) -> list[Comparison]:
    """Groups runs into comparisons: the one with the most arms first, then in the order of the runs."""
    arms: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        key = [repr(sorted(found.items())) for found in (shared_setting(run), router_side(run), execution(run))]
        # The same arm with the same seed twice: a repetition, shown as an arm of its own.
        repeat = 0
        while any(other.seed == run.seed for other in arms.get((*key, repeat), [])):
            repeat += 1
        arms.setdefault((*key, repeat), []).append(run)
    ordered = [Arm(tuple(sorted(found, key=lambda run: run.seed))) for found in arms.values()]
    groups: list[list[Arm]] = []
    # Those with most seeds first, so that a table has a seed in common wherever there is one.
    for arm in sorted(ordered, key=lambda arm: -len(arm.runs)):
        group = next((group for group in groups if belongs(arm, group)), None)
        groups.append([arm]) if group is None else group.append(arm)
    place = {id(arm): i for i, arm in enumerate(ordered)}
    found_groups = [tuple(sorted(group, key=lambda arm: place[id(arm)])) for group in groups]
    found_groups.sort(key=lambda group: (-len(group), place[id(group[0])]))
    return [Comparison(group, setting(group)) for group in found_groups]


def belongs(arm: Arm, group: list[Arm]) -> bool:
    """Whether an arm agrees with those of a table, and shares a seed with one of them."""
    mine, theirs = setting((arm,)), setting(tuple(group))
    agree = all(mine.get(key) == theirs.get(key) for key in {*mine, *theirs} - {"seed", *BY_SEED})
    shared = set(mine["seed"]) & set(theirs["seed"])
    return agree and bool(shared) and all(mine[key][seed] == theirs[key][seed] for key in BY_SEED for seed in shared)


def shared_setting(run: Run) -> dict[str, Any]:
    """What has to agree between runs of any seed, by dotted key."""
    manifest = run.manifest
    found = {name: manifest[name] for name in ("corpus_fingerprint", "steps", "sequences", "tokens")}
    found |= {"git_commit": manifest.get("git_commit"), "python": manifest.get("python")}
    found["device"] = THREADS.sub("", manifest["device"])
    # Trained from there on, whatever the configuration says of the time before.
    found |= {"started_from": manifest["started_from"]} if manifest.get("started_from") else {}
    # Of a model of transformers: what its configuration file said.
    found |= flatten({"architecture": manifest["architecture"]}) if manifest.get("architecture") else {}
    found |= {f"packages.{name}": version for name, version in manifest["packages"].items()}
    return found | configured(run, (*ROUTER, *NAMING, *EXECUTION, *looking_on(run), "seed"), without=True)


def looking_on(run: Run) -> list[str]:
    """The keys of callbacks that change nothing that is computed; one of somebody else's may."""
    listed = run.config.get("callbacks") or {}
    return [f"callbacks.{name}" for name, node in listed.items() if str(node.get("_target_")).startswith(CALLBACKS)]


def setting(arms: tuple[Arm, ...]) -> dict[str, Any]:
    """What has to agree between arms: the shared setting, the seeds, and what depends on each seed."""
    runs = {run.seed: run for arm in arms for run in arm.runs}
    found = {**shared_setting(arms[0].first), "seed": sorted(runs)}
    return found | {name: {seed: runs[seed].manifest[name] for seed in sorted(runs)} for name in BY_SEED}


def router_side(run: Run) -> dict[str, Any]:
    """The router's options and the coefficients of its losses: what may differ between arms."""
    return configured(run, ROUTER) | flatten({"loss_coefficients": run.ledger.get("loss_coefficients") or {}})


def execution(run: Run) -> dict[str, Any]:
    """What changes the speed of a run and not its numbers."""
    return configured(run, EXECUTION) | {"world_size": run.manifest["world_size"], "device": run.manifest["device"]}


def configured(run: Run, names: tuple[str, ...], without: bool = False) -> dict[str, Any]:
    """The configuration under some names, or without them, by dotted key."""
    found = flatten(run.config).items()
    return {key: value for key, value in found if any(f"{key}.".startswith(f"{n}.") for n in names) != without}


def differences(one: Comparison, other: Comparison) -> list[tuple[str, Any, Any]]:
    """The fields in which two comparisons differ, with both values; those that somebody configured come first.

    What depends on the seed is compared for the seeds that both have.
    """
    shared = sorted(set(one.seeds) & set(other.seeds))
    found = []
    for key in sorted({*one.setting, *other.setting}, key=lambda key: (not is_configured((one, other), key), key)):
        here, there = one.setting.get(key), other.setting.get(key)
        if key not in BY_SEED:
            found.append((key, here, there))
        for seed in shared if key in BY_SEED else ():
            field = key if len(shared) == 1 else f"{key} (seed {seed})"
            found.append((field, one.setting[key][seed], other.setting[key][seed]))
    return [(field, here, there) for field, here, there in found if here != there]


def is_configured(comparisons: Sequence[Comparison], key: str) -> bool:
    return any(key in flatten(comparison.arms[0].first.config) for comparison in comparisons)


def stage_of(arm: Arm, mode: str) -> str:
    """How the names of what an evaluation mode logged begin."""
    return "final" if mode == arm.modes[0] else f"final_{mode}"


def unequal(arms: Sequence[Arm], name: str, tolerance: float = 0.01) -> bool:
    """Whether a cost of the ledger differs between arms by more than a share of the smallest."""
    costs = [float(arm.first.ledger[name]) for arm in arms]
    return max(costs) > (1 + tolerance) * min(costs)
