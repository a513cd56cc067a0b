"""Which runs may stand in one table: those that agree in everything but the router.

A run's *setting* is what has to agree: corpus, batches, initial weights, steps, tokens, packages, commit, device and
the configuration outside the router. Runs of one arm differ in their seed alone; arms stand in one table if they share
a seed and have, seed by seed, the same batches and initial weights. Differences are over the seeds two arms share.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lightning_base.program.run_directory import EXECUTION, NAMING, under
from lightning_base.results.read import Run, flatten

# Of the manifest, what has to agree beside the configuration: the last are the checkpoint that a run started from, and
# what the configuration file of a model of transformers said.
COUNTED = ("steps", "sequences", "tokens")
# The code, as it is and as it was when earlier steps were computed.
CODE = ("git_commit", "python", "packages", "sources", "earlier_sources")
SHARED = ("corpus_fingerprint", *COUNTED, *CODE, "started_from", "architecture")
# What changes the speed of a run and not its numbers.
EXECUTED = (*EXECUTION, "world_size", "device")
# The router's own side of a run: what a comparison is about.
ROUTER_SOURCES = "sources.router"
ROUTER = (
    "router",
    ROUTER_SOURCES,
    "module.loss_coefficients",
    "module.router_init_scale",
    "module.router_learning_rate_factor",
    "model.shuffle_tokens",
    "ledger.loss_coefficients",
)
# Of this package, they look on.
CALLBACKS = "lightning_base.callbacks."
BY_SEED = ("batch_fingerprint", "initial_weights_fingerprint")
THREADS = re.compile(r", \d+ threads?$")
Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
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
    def modes(self) -> dict[str, bool]:
        """The ways in which the validation text was routed, and whether they never look ahead; the first one counts."""
        return dict(self.first.ledger["evaluation_modes"])

    @property
    def sparse(self) -> bool:
        """Whether there is anything to route between."""
        return bool(self.first.ledger["num_experts"] > 1)

    @property
    def causal(self) -> bool:
        """Whether its validation loss is that of a language model, which does not look at later tokens."""
        return next(iter(self.modes.values()))


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
    def reference(self) -> Arm:
        """The arm that others are held against: the one with one expert, or else the first that may be ranked."""
        ranked = [arm for arm in self.arms if arm.causal] or self.arms
        return next((arm for arm in ranked if not arm.sparse), ranked[0])


def compare(runs: list[Run]) -> list[Comparison]:
    """Groups runs into comparisons: the one with the most arms first, then in the order of the runs."""
    sides = {run: (shared_setting(run), run.chosen(ROUTER), run.chosen(EXECUTED)) for run in runs}

    def repeats(run: Run, arm: list[Run]) -> bool:
        # The same arm with the same seed twice is shown as an arm of its own.
        return sides[run] == sides[arm[0]] and run.seed not in [other.seed for other in arm]

    arms = [Arm(tuple(sorted(found, key=lambda run: run.seed))) for found in gather(runs, repeats)]
    # Those with most seeds first, so that a table has a seed in common wherever there is one.
    groups = gather(sorted(arms, key=lambda arm: -len(arm.runs)), belongs)
    ordered = [sorted(group, key=arms.index) for group in groups]
    ordered.sort(key=lambda group: (-len(group), arms.index(group[0])))
    return [Comparison(tuple(group), setting(group)) for group in ordered]


def gather(items: Iterable[Item], fits: Callable[[Item, list[Item]], bool]) -> list[list[Item]]:
    """Puts each item into the first group that it fits, or into one of its own."""
    groups: list[list[Item]] = []
    for item in items:
        group = next((group for group in groups if fits(item, group)), None)
        groups.append([item]) if group is None else group.append(item)
    return groups


def belongs(arm: Arm, group: Sequence[Arm]) -> bool:
    """Whether an arm shares a seed with one of a table, and agrees with all of them in what has to agree."""
    shared = {seed for other in group for seed in other.seeds if seed in arm.seeds}
    return bool(shared) and setting((arm,), shared) == setting(group, shared)


def setting(arms: Sequence[Arm], seeds: set[int] | None = None) -> dict[str, Any]:
    """What has to agree between arms: the shared setting, the seeds, or only some, and what depends on each seed."""
    runs = {run.seed: run for arm in arms for run in arm.runs if seeds is None or run.seed in seeds}
    by_seed = {name: {seed: runs[seed].manifest[name] for seed in sorted(runs)} for name in BY_SEED}
    return {**shared_setting(arms[0].first), "seed": sorted(runs), **by_seed}


def shared_setting(run: Run) -> dict[str, Any]:
    """What has to agree between runs of any seed, by dotted key."""
    # Callbacks of somebody else's may change what is computed.
    callbacks = (run.config.get("callbacks") or {}).items()
    ours = tuple(f"callbacks.{name}" for name, node in callbacks if str(node.get("_target_")).startswith(CALLBACKS))
    other = (*ROUTER, *NAMING, *EXECUTION, *ours, "seed", "trainer.record_plans")
    configured = {key: run.fields[key] for key in flatten(run.config) if not under(key, other)}
    # The commit says less than a hash of the sources: it changes with a page of documentation.
    other += ("git_commit",) * bool(run.chosen(("sources.program",)))
    shared = {key: value for key, value in run.chosen(SHARED).items() if not under(key, other)}
    return {**shared, "device": THREADS.sub("", run.manifest["device"]), **configured}


def varying(described: Sequence[dict[str, Any]]) -> list[str]:
    """The keys with values that are not the same in all of these, in order."""
    keys = sorted({key for each in described for key in each})
    return [key for key in keys if any(each.get(key) != described[0].get(key) for each in described)]


def stage_of(arm: Arm, mode: str) -> str:
    """How the names of what an evaluation mode logged begin."""
    return "final" if mode == next(iter(arm.modes)) else f"final_{mode}"


def unequal(arms: Sequence[Arm], name: str, tolerance: float = 0.01) -> bool:
    """Whether a cost of the ledger differs between arms by more than a share of the smallest."""
    costs = [float(arm.first.ledger[name]) for arm in arms]
    return max(costs) > (1 + tolerance) * min(costs)
