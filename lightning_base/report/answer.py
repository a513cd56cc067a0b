"""What the numbers say, in sentences. Every order of arms in them is computed from paired differences."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_base.report.fairness import Comparison, execution, unequal
from lightning_base.report.measures import (
    Reader,
    by_seed,
    final_loss,
    mean,
    short_count,
    signed,
    under_unigram,
    unigram_entropy,
)
from lightning_base.report.quiet import machine_noise
from lightning_base.report.read import Run
from lightning_base.report.statistics import Interval, holm, paired

# Of arms beyond noise, as usual; after Holm's correction.
LEVEL = 0.05
# More names than these make a sentence unreadable.
MOST_NAMED = 6


@dataclass(frozen=True)
class Contrast:
    """The loss of ``arm`` minus that of ``other``, over the ``seeds`` both have; both are places in the comparison.

    ``p`` is corrected for the contrasts with the same ``other``; nan with one seed.
    """

    arm: int
    other: int
    seeds: tuple[int, ...]
    interval: Interval
    p: float

    @property
    def decided(self) -> int:
        """1 if the arm is above the other beyond noise, -1 if below, else 0."""
        return int(math.copysign(1, self.interval.mean)) if self.p < LEVEL else 0

    @property
    def text(self) -> str:
        margin = f" ± {self.interval.margin:.4f}" if self.interval.known else ""
        return signed(self.interval.mean) + margin


def contrasts(comparison: Comparison, other: int, arms: Sequence[int], read: Reader = final_loss) -> list[Contrast]:
    """Each of some arms against another; arms that share no seed with it, or look ahead, have none."""
    theirs = by_seed(comparison.arms[other], read)
    found = []
    for i in arms:
        mine = by_seed(comparison.arms[i], read)
        both = [s for s in mine if s in theirs and math.isfinite(mine[s]) and math.isfinite(theirs[s])]
        if i != other and both and comparison.arms[i].causal and comparison.arms[other].causal:
            found.append((i, tuple(both), paired([mine[s] for s in both], [theirs[s] for s in both])))
    known = [difference.p for *_, difference in found if difference.known]
    corrected = iter(holm(known))
    return [Contrast(i, other, s, gap, next(corrected) if gap.known else math.nan) for i, s, gap in found]


def all_contrasts(comparison: Comparison) -> list[Contrast]:
    """Every arm against the reference, and BASE against every arm that it has not been held against by that."""
    arms, reference = comparison.arms, comparison.reference
    found = contrasts(comparison, reference, range(len(arms)))
    mine = [i for i, arm in enumerate(arms) if arm.router == "BASE" and arm.causal and i != reference]
    for base in mine if arms[reference].router != "BASE" else []:
        found += contrasts(comparison, base, [i for i in range(len(arms)) if i not in (base, reference)])
    return found


def answer(comparison: Comparison, labels: Sequence[str]) -> list[str]:
    """One or two sentences: which arms are above and below the reference beyond noise, and where BASE stands."""
    losses = [mean(arm, final_loss) for arm in comparison.arms]
    ranked = [f"{x} {loss:.4f}" for x, loss, arm in zip(labels, losses, comparison.arms, strict=True) if arm.causal]
    if not ranked:
        return ["Every arm looks at later tokens in evaluation: none of these losses is that of a language model."]
    if len(ranked) == 1:
        return [f"{ranked[0]} nats per token is the validation loss; there is no other arm to compare it with."]
    found = all_contrasts(comparison)
    if not any(contrast.interval.known for contrast in found):
        texts = f"are {listed(ranked)} nats per token" if len(ranked) <= MOST_NAMED else "stand in the table"
        return [f"One seed does not support a ranking. The validation losses {texts}; seed=1,2,3 gives intervals."]
    sentences = []
    for other in dict.fromkeys(contrast.other for contrast in found):
        mine = [contrast for contrast in found if contrast.other == other and contrast.interval.known]
        single = [labels[c.arm] for c in found if c.other == other and not c.interval.known]
        left = f" Not ranked, with one seed in common: {listed(single)}." if single else ""
        numbers = sorted({len(contrast.seeds) for contrast in mine})
        seeds = " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1])))) if mine else ""
        if mine and other == comparison.reference:
            where = f"{labels[other]} ({losses[other]:.4f} nats per token, {seeds} paired seeds)"
            words = placed(mine, labels, ("lower with", "higher with", "within the noise with"))
            sentences.append(f"Against {where}, the validation loss is {words}{left}")
        elif mine:
            # Arms minus BASE, turned round: where BASE stands.
            words = placed(mine, labels, ("beaten by", "better than", "within the noise of"))
            sentences.append(f"{labels[other]} is {words}{left}")
    return sentences


def placed(found: Sequence[Contrast], labels: Sequence[str], words: tuple[str, str, str]) -> str:
    """The arms below, above and not told apart from another, with their differences, the largest first."""
    parts = []
    for sign, word in zip((-1, 1, 0), words, strict=True):
        group = sorted(
            (contrast for contrast in found if contrast.decided == sign), key=lambda c: -abs(c.interval.mean)
        )
        # Of many, and of those not told apart, labels alone: the figure has the numbers.
        plain = not sign or len(group) > MOST_NAMED
        names = [labels[c.arm] if plain else f"{labels[c.arm]} ({c.text})" for c in group]
        parts += [f"{word} {listed(names)}"] * bool(names)
    return f"{listed(parts)}."


def cautions(comparison: Comparison, labels: Sequence[str]) -> Iterator[str]:
    """What makes the arms of a table unequal in cost, seeds or speed, or their code unknown; what is not ranked."""
    arms, named_arms = comparison.arms, list(zip(labels, comparison.arms, strict=True))
    ahead = [f"{label} ({mean(arm, final_loss):.4f})" for label, arm in named_arms if not arm.causal]
    if 0 < len(ahead) < len(arms):
        yield f"Not ranked, because later tokens change what earlier ones are given in evaluation: {listed(ahead)}."
    lacking = [
        f"{label} lacks {listed([str(seed) for seed in comparison.seeds if seed not in arm.seeds])}"
        for label, arm in named_arms
        if arm.seeds != comparison.seeds
    ]
    if lacking:
        yield f"Not every arm has every seed: {'; '.join(lacking)}. Differences are over the seeds that both arms have."
    infinite = [label for label, arm in named_arms if not all(map(math.isfinite, by_seed(arm, final_loss).values()))]
    if infinite:
        yield f"A validation loss is not finite, and is in no difference: {listed(infinite)}."
    for name, words in (("flops_per_token", "active FLOPs per token"), ("active_parameters", "active parameters")):
        if unequal(arms, name):
            costs = [float(arm.first.ledger[name]) for arm in arms]
            values = [f"{label} {short_count(cost)}" for label, cost in zip(labels, costs, strict=True)]
            excess = 100 * (max(costs) / min(costs) - 1)
            yield f"Unequal {words}: {', '.join(values)}; the largest is {excess:.1f} % above the smallest."
    yield from speed_cautions(comparison, labels)
    yield from damaged_checkpoints(comparison, labels)
    entropy = mean(arms[0], unigram_entropy)
    above = [label for label, arm in named_arms if (gap := mean(arm, under_unigram)) is not None and gap <= 0]
    if above and entropy is not None:
        yield (
            f"Predicting every token from its frequency alone would cost {entropy:.4f} nats (unigram entropy); not "
            f"below it: {listed(above)}."
        )
    alarms = [label for label, arm in named_arms if any(run.status.get("alarms") for run in arm.runs)]
    if alarms:
        yield f"Alarms were raised while training {listed(alarms)}: they are listed under “What raised an alarm?”."
    commit = comparison.setting.get("git_commit")
    if commit is None or str(commit).endswith("-dirty"):
        why = "The commit of the code is unknown" if commit is None else "The code had uncommitted changes"
        yield f"{why}: that all arms ran the same code is not certain."


def speed_cautions(comparison: Comparison, labels: Sequence[str]) -> Iterator[str]:
    """Why speeds do not compare: other ways of running, or a machine that was not quiet."""
    ways = [execution(arm.first) for arm in comparison.arms]
    keys = sorted({key for way in ways for key in way if any(way.get(key) != other.get(key) for other in ways)})
    if keys:
        values = [
            f"{label} {', '.join(f'{key}={way.get(key)}' for key in keys)}"
            for label, way in zip(labels, ways, strict=True)
        ]
        yield f"Speeds are not comparable, the arms did not run in the same way: {'; '.join(values)}."
    moved = [
        f"{label}, seed {run.seed} ({layouts_of(run)})"
        for label, arm in zip(labels, comparison.arms, strict=True)
        for run in arm.runs
        if len(run.manifest.get("layouts") or []) > 1
    ]
    if moved:
        yield f"Went on with other ranks or another accumulation, so that its speed is of several: {'; '.join(moved)}."
    found = [
        f"{label} ({noise.slower:.2f} times as long, quartiles {100 * noise.spread:.0f} % of it apart)"
        for label, noise in zip(labels, machine_noise(comparison.arms), strict=True)
        if noise and noise.disturbed
    ]
    if found:
        yield (
            "The machine was not quiet. A fixed piece of work, timed between steps, took longer or was less even than "
            f"beside the quietest arm with {listed(found)}."
        )


def layouts_of(run: Run) -> str:
    """In which layouts the steps of a run were computed."""
    return ", ".join(
        f"from step {layout['from_step']} {layout['strategy']} with {layout['world_size']} rank"
        f"{'s' * (layout['world_size'] != 1)} and accumulation {layout['accumulation']}"
        for layout in run.manifest["layouts"]
    )


def damaged_checkpoints(comparison: Comparison, labels: Sequence[str]) -> Iterator[str]:
    """The checkpoints that a run could not go on from when it was started again."""
    for label, arm in zip(labels, comparison.arms, strict=True):
        for run in arm.runs:
            passed = [each["reason"] for resume in run.manifest.get("resumes") or [] for each in resume["passed_over"]]
            if passed:
                yield f"{label}, seed {run.seed}, went on from an older checkpoint: {'; '.join(dict.fromkeys(passed))}."


def balance_sentence(comparison: Comparison, labels: Sequence[str]) -> str:
    """Which sparse arms computed exactly even loads in every routing group that was logged; empty if none has any."""
    worst = {
        label: max(float(found.values.max()) for found in series)
        for label, arm in zip(labels, comparison.arms, strict=True)
        if arm.sparse and (series := [s for run in arm.runs if (s := run.series.get("train_group/max_vio/load/max"))])
    }
    even = [label for label, value in worst.items() if value == 0]
    uneven = sorted((value, label) for label, value in worst.items() if value > 0)
    parts = [f"exactly even in {listed(even)}"] * bool(even)
    parts += [f"up to {value:.2f} above even in {label}" for value, label in uneven[-MOST_NAMED:]]
    return f"The fullest expert of a routing group, worst logged step: {listed(parts)}." if parts else ""


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
