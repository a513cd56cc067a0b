"""What the numbers say, in sentences. Every order of arms in them is computed from paired differences."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_base.report import measures
from lightning_base.report.fairness import Arm, Comparison, execution, unequal
from lightning_base.report.measures import Reader, by_seed, final_loss, mean
from lightning_base.report.read import Run
from lightning_base.report.speed import machine_noise, side_by_side
from lightning_base.report.statistics import Interval, holm, paired
from lightning_base.report.words import WORDS

# Of arms beyond noise, as usual; after Holm's correction.
LEVEL = 0.05
# More names than these make a sentence unreadable.
MOST_NAMED = 6
# The signs behind names and cells.
NOT_CAUSAL_IN_TRAINING, NOT_CAUSAL_IN_EVALUATION, NOT_QUIET, OTHER_COST, OTHER_GRADIENT = "†", "‡", "§", "¶", "‖"


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
        return measures.signed(self.interval.mean) + margin


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


def against_reference(comparison: Comparison, read: Reader = final_loss) -> dict[int, Contrast]:
    """Every other arm against the reference, by its place."""
    found = contrasts(comparison, comparison.reference, range(len(comparison.arms)), read)
    return {contrast.arm: contrast for contrast in found}


def all_contrasts(comparison: Comparison) -> list[Contrast]:
    """Every arm against the reference, and BASE against every arm that it has not been held against by that."""
    arms, reference = comparison.arms, comparison.reference
    found = list(against_reference(comparison).values())
    mine = [i for i, arm in enumerate(arms) if arm.router == "BASE" and arm.causal and i != reference]
    for base in mine if arms[reference].router != "BASE" else []:
        found += contrasts(comparison, base, [i for i in range(len(arms)) if i not in (base, reference)])
    return found


def answer(comparison: Comparison) -> list[str]:
    """One or two sentences: which arms are above and below the reference beyond noise, and where BASE stands."""
    arms, found = comparison.arms, all_contrasts(comparison)
    ranked = [f"{arm.label} {mean(arm, final_loss):.4f}" for arm in arms if arm.causal]
    if not ranked:
        return ["Every arm looks at later tokens in evaluation: none of these losses is that of a language model."]
    if len(ranked) == 1:
        return [f"{ranked[0]} nats per token is the validation loss; there is no other arm to compare it with."]
    if not any(contrast.interval.known for contrast in found):
        texts = f"are {listed(ranked)} nats per token" if len(ranked) <= MOST_NAMED else "stand in the table"
        return [f"One seed does not support a ranking. The validation losses {texts}; seed=1,2,3 gives intervals."]
    sentences = []
    for other in dict.fromkeys(contrast.other for contrast in found if contrast.interval.known):
        mine = [contrast for contrast in found if contrast.other == other and contrast.interval.known]
        # Arms minus BASE, turned round: where BASE stands.
        start, words = f"{arms[other].label} is", ("beaten by", "better than", "within the noise of")
        if other == comparison.reference:
            numbers = sorted({len(contrast.seeds) for contrast in mine})
            seeds = " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))
            where = f"{arms[other].label} ({mean(arms[other], final_loss):.4f} nats per token, {seeds} paired seeds)"
            start = f"Against {where}, the validation loss is"
            words = ("lower with", "higher with", "within the noise with")
        single = [arms[c.arm].label for c in found if c.other == other and not c.interval.known]
        left = f" Not ranked, with one seed in common: {listed(single)}." if single else ""
        sentences.append(f"{start} {placed(mine, arms, words)}{left}")
    return sentences


def placed(found: Sequence[Contrast], arms: Sequence[Arm], words: tuple[str, str, str]) -> str:
    """The arms below, above and not told apart from another, with their differences, the largest first."""
    parts = []
    for sign, word in zip((-1, 1, 0), words, strict=True):
        group = sorted((c for c in found if c.decided == sign), key=lambda c: -abs(c.interval.mean))
        # Of many, and of those not told apart, labels alone: the figure has the numbers.
        plain = not sign or len(group) > MOST_NAMED
        names = [arms[c.arm].label + (f" ({c.text})" if not plain else "") for c in group]
        parts += [f"{word} {listed(names)}"] * bool(names)
    return f"{listed(parts)}."


def cautions(comparison: Comparison) -> Iterator[str]:
    """What makes the arms of a table unequal in cost, seeds or speed, or their code unknown; what is not ranked."""
    arms = comparison.arms
    ahead = [f"{arm.label} ({mean(arm, final_loss):.4f})" for arm in arms if not arm.causal]
    if 0 < len(ahead) < len(arms):
        yield f"Not ranked, because later tokens change what earlier ones are given in evaluation: {listed(ahead)}."
    lacks = {arm.label: [str(seed) for seed in comparison.seeds if seed not in arm.seeds] for arm in arms}
    if any(lacks.values()):
        found = "; ".join(f"{label} lacks {listed(seeds)}" for label, seeds in lacks.items() if seeds)
        yield f"Not every arm has every seed: {found}. Differences are over the seeds that both arms have."
    infinite = [arm.label for arm in arms if not all(map(math.isfinite, by_seed(arm, final_loss).values()))]
    if infinite:
        yield f"A validation loss is not finite, and is in no difference: {listed(infinite)}."
    for name, words in (("flops_per_token", "active FLOPs per token"), ("active_parameters", "active parameters")):
        if unequal(arms, name):
            costs = {arm.label: float(arm.first.ledger[name]) for arm in arms}
            values = ", ".join(f"{label} {measures.short_count(cost)}" for label, cost in costs.items())
            excess = 100 * (max(costs.values()) / min(costs.values()) - 1)
            yield f"Unequal {words}: {values}; the largest is {excess:.1f} % above the smallest."
    yield from speed_cautions(arms)
    yield from damaged_checkpoints(arms)
    entropy = mean(arms[0], measures.unigram_entropy)
    above = [arm.label for arm in arms if (gap := mean(arm, measures.under_unigram)) is not None and gap <= 0]
    if above and entropy is not None:
        yield (
            f"Predicting every token from its frequency alone would cost {entropy:.4f} nats (unigram entropy); not "
            f"below it: {listed(above)}."
        )
    alarms = [arm.label for arm in arms if any(run.status.get("alarms") for run in arm.runs)]
    if alarms:
        yield f"Alarms were raised while training {listed(alarms)}: they are listed under “What raised an alarm?”."
    commit = comparison.setting.get("git_commit")
    if commit is None or str(commit).endswith("-dirty"):
        why = "The commit of the code is unknown" if commit is None else "The code had uncommitted changes"
        yield f"{why}: that all arms ran the same code is not certain."


def speed_cautions(arms: Sequence[Arm]) -> Iterator[str]:
    """Why speeds do not compare: other ways of running, such as more threads, or a machine that was not quiet."""
    ways = {arm.label: execution(arm.first) for arm in arms}
    keys = sorted({key for way in ways.values() for key in way if any(way[key] != o.get(key) for o in ways.values())})
    if keys:
        values = (f"{label} {', '.join(f'{key}={way.get(key)}' for key in keys)}" for label, way in ways.items())
        yield f"Speeds are not comparable, the arms did not run in the same way: {'; '.join(values)}."
    moved = [
        f"{arm.label}, seed {run.seed} ({layouts_of(run)})"
        for arm in arms
        for run in arm.runs
        if len(run.manifest.get("layouts") or []) > 1
    ]
    if moved:
        yield f"Went on with other ranks or another accumulation, so that its speed is of several: {'; '.join(moved)}."
    if beside := [arm.label for arm in side_by_side(arms)]:
        yield f"Speeds are not comparable, runs shared the machine with others of this table: {listed(beside)}."
    found = [
        f"{arm.label} ({noise.slower:.2f} times as long, quartiles {100 * noise.spread:.0f} % of it apart)"
        for arm, noise in zip(arms, machine_noise(arms), strict=True)
        if noise.disturbed
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


def damaged_checkpoints(arms: Sequence[Arm]) -> Iterator[str]:
    """The checkpoints that a run could not go on from when it was started again."""
    for arm in arms:
        for run in arm.runs:
            passed = [each["reason"] for resume in run.manifest.get("resumes") or [] for each in resume["passed_over"]]
            if passed:
                reasons = "; ".join(dict.fromkeys(passed))
                yield f"{arm.label}, seed {run.seed}, went on from an older checkpoint: {reasons}."


def balance_sentence(comparison: Comparison) -> str:
    """Which sparse arms computed exactly even loads in every routing group that was logged; empty if none has any."""
    name = "train_group/max_vio/load/max"
    worst = {
        arm.label: max(float(run.series[name].values.max()) for run in arm.runs if name in run.series)
        for arm in comparison.arms
        if arm.sparse and any(name in run.series for run in arm.runs)
    }
    even = [label for label, value in worst.items() if value == 0]
    uneven = sorted((value, label) for label, value in worst.items() if value > 0)
    parts = [f"exactly even in {listed(even)}"] * bool(even)
    parts += [f"up to {value:.2f} above even in {label}" for value, label in uneven[-MOST_NAMED:]]
    return f"The fullest expert of a routing group, worst logged step: {listed(parts)}." if parts else ""


def footnotes(comparison: Comparison) -> Iterator[str]:
    """What the signs in the tables mean; only those that occur."""
    arms, modes = comparison.arms, [arm.causal_in(mode) for arm in comparison.arms for mode in arm.modes]
    if len(comparison.seeds) > 1:
        yield WORDS["notes"]["several"]
    if not all(arm.causal_in(None) for arm in arms):
        yield WORDS["notes"]["training"] + f", unless marked {NOT_CAUSAL_IN_EVALUATION}" * (not all(modes)) + "."
    if not all(modes):
        yield WORDS["notes"]["evaluation"]
    if any(arm.straight_through for arm in arms):
        yield WORDS["notes"]["gradient"]
    if any(noise.disturbed for noise in machine_noise(arms)):
        yield WORDS["notes"]["noise"]
    if any(costs_more(comparison)):
        yield WORDS["notes"]["cost"]


def costs_more(comparison: Comparison) -> list[bool]:
    reference = comparison.arms[comparison.reference]
    return [unequal((arm, reference), "flops_per_token") for arm in comparison.arms]


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
