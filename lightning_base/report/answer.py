"""What the numbers say, in sentences. Every order of arms in them is computed from paired differences."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from lightning_base.report import measures
from lightning_base.report.labels import changed_sources, listed
from lightning_base.report.measures import Reader, by_seed, final_loss, machine_noise, mean
from lightning_base.results.fairness import EXECUTED, Arm, Comparison, unequal, varying
from lightning_base.results.read import Run
from lightning_base.results.statistics import Interval, holm, interval

# More names than these make a sentence unreadable.
MOST_NAMED = 6
# The signs behind names and cells.
NOT_CAUSAL_IN_TRAINING, NOT_CAUSAL_IN_EVALUATION, NOT_QUIET, OTHER_COST, OTHER_GRADIENT = "†", "‡", "§", "¶", "‖"


def contrasts(other: Arm, arms: Sequence[Arm], read: Reader = final_loss) -> dict[Arm, Interval]:
    """The loss of each of some arms minus that of another over the seeds both have; p is corrected for all of these.

    Arms that share no seed with the other, or look ahead, have none.
    """
    theirs, found = by_seed(other, read), {}
    for arm in arms:
        gaps = [loss - theirs[seed] for seed, loss in by_seed(arm, read).items() if seed in theirs]
        finite = list(filter(math.isfinite, gaps))
        if finite and arm is not other and arm.causal and other.causal:
            found[arm] = interval(finite)
    corrected = holm([gap.p for gap in found.values()])
    return {arm: replace(gap, p=p) for (arm, gap), p in zip(found.items(), corrected, strict=True)}


def all_contrasts(comparison: Comparison) -> dict[Arm, dict[Arm, Interval]]:
    """By what is subtracted: every arm minus the reference, and every arm but that minus BASE."""
    arms, reference = comparison.arms, comparison.reference
    others = [arm for arm in arms if arm is not reference]
    bases = [arm for arm in others if arm.router == "BASE" and reference.router != "BASE"]
    return {reference: contrasts(reference, arms), **{base: contrasts(base, others) for base in bases}}


def answer(comparison: Comparison) -> Iterator[str]:
    """One or two sentences: which arms are above and below the reference beyond noise, and where BASE stands."""
    found = all_contrasts(comparison)
    ranked = [f"{arm.label} {mean(arm, final_loss):.4f}" for arm in comparison.arms if arm.causal]
    if not ranked:
        yield "Every arm looks at later tokens in evaluation: none of these losses is that of a language model."
    elif len(ranked) == 1:
        yield f"{ranked[0]} nats per token is the validation loss; there is no other arm to compare it with."
    elif not any(gap.known for gaps in found.values() for gap in gaps.values()):
        texts = f"are {listed(ranked)} nats per token" if len(ranked) <= MOST_NAMED else "stand in the table"
        yield f"One seed does not support a ranking. The validation losses {texts}; seed=1,2,3 gives intervals."
    for other, gaps in found.items():
        known = {arm: gap for arm, gap in gaps.items() if gap.known}
        if not known:
            continue
        # Arms minus BASE, turned round: where BASE stands.
        start, words = f"{other.label} is", ("beaten by", "better than", "within the noise of")
        if other is comparison.reference:
            numbers = sorted({len(gap.values) for gap in known.values()})
            seeds = " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))
            where = f"{other.label} ({mean(other, final_loss):.4f} nats per token, {seeds} paired seeds)"
            start = f"Against {where}, the validation loss is"
            words = ("lower with", "higher with", "within the noise with")
        single = [arm.label for arm in gaps if arm not in known]
        left = f" Not ranked, with one seed in common: {listed(single)}." if single else ""
        yield f"{start} {placed(known, words)}.{left}"


def placed(found: dict[Arm, Interval], words: tuple[str, str, str]) -> str:
    """The arms below, above and not told apart from another, with their differences, the largest first."""
    parts = []
    for sign, word in zip((-1, 1, 0), words, strict=True):
        group = sorted((arm for arm in found if found[arm].decided == sign), key=lambda arm: -abs(found[arm].mean))
        # Of many, and of those not told apart, labels alone: the figure has the numbers.
        numbers = sign and len(group) <= MOST_NAMED
        names = [arm.label + (f" ({measures.paired(found[arm])})" if numbers else "") for arm in group]
        parts += [f"{word} {listed(names)}"] * bool(names)
    return listed(parts)


def cautions(comparison: Comparison) -> list[str]:
    """What makes the arms of a table unequal in cost, seeds or speed, or their code unknown; what is not ranked."""
    arms, commit = comparison.arms, comparison.setting.get("git_commit")
    changed = "The code had uncommitted changes" if str(commit).endswith("-dirty") else ""
    code = changed if commit else "The commit of the code is unknown"
    code *= not arms[0].first.chosen(("sources.program",))  # a hash of it is known, and the same in all arms
    runs = [(f"{arm.label}, seed {run.seed}", run) for arm in arms for run in arm.runs]
    ahead = [f"{arm.label} ({mean(arm, final_loss):.4f})" for arm in arms if not arm.causal]
    lacking = [(arm.label, [str(seed) for seed in comparison.seeds if seed not in arm.seeds]) for arm in arms]
    infinite = [arm.label for arm in arms if not all(map(math.isfinite, by_seed(arm, final_loss).values()))]
    ways = [arm.first.chosen(EXECUTED) for arm in arms]
    way = [", ".join(f"{key}={way.get(key)}" for key in varying(ways)) for way in ways]
    noisy = [
        f"{arm.label} ({noise.slower:.2f} times as long, quartiles {100 * noise.spread:.0f} % of it apart)"
        for arm, noise in machine_noise(arms).items()
    ]
    old = [f"{name}, went on from an older checkpoint: {text}" for name, run in runs if (text := passed_over(run))]
    entropy = mean(arms[0], measures.unigram_entropy)
    under = [arm.label for arm in arms if mean(arm, measures.under_unigram) <= 0]
    found = {
        "Not ranked, because later tokens change what earlier ones are given in evaluation: {}.": listed(
            ahead if len(ahead) < len(arms) else []
        ),
        "Not every arm has every seed: {}. Differences are over the seeds that both arms have.": "; ".join(
            f"{label} lacks {listed(seeds)}" for label, seeds in lacking if seeds
        ),
        "A validation loss is not finite, and is in no difference: {}.": listed(infinite),
        "Unequal active FLOPs per token: {}.": unequal_costs(arms, "flops_per_token"),
        "Unequal active parameters: {}.": unequal_costs(arms, "active_parameters"),
        "Speeds are not comparable, the arms did not run in the same way: {}.": "; ".join(
            f"{arm.label} {text}" for arm, text in zip(arms, way, strict=True) if text
        ),
        "Went on with other ranks or another accumulation, so that its speed is of several: {}.": "; ".join(
            f"{name} ({text})" for name, run in runs if (text := layouts_of(run))
        ),
        "Speeds are not comparable, runs shared the machine with others of this table: {}.": listed(
            [arm.label for arm in measures.side_by_side(arms)]
        ),
        "The machine was not quiet. A fixed piece of work, timed between steps, took longer or was less even than "
        "beside the quietest arm with {}.": listed(noisy),
        "{}.": "; ".join(old),
        f"Predicting every token from its frequency alone would cost {entropy:.4f} nats (unigram entropy); not below "
        "it: {}.": listed(under),
        "Alarms were raised while training {}: they are listed under “What raised an alarm?”.": listed(
            [arm.label for arm in arms if any(run.status.get("alarms") for run in arm.runs)]
        ),
        "{}: that all arms ran the same code is not certain.": code,
        "A plugin was changed between runs of one router, which are arms of their own: {}.": "; ".join(
            changed_sources(combinations(arms, 2))
        ),
    }
    return [text.format(what) for text, what in found.items() if what]


def unequal_costs(arms: Sequence[Arm], name: str) -> str:
    """What each arm spends, if that is not the same."""
    costs = {arm.label: float(arm.first.ledger[name]) for arm in arms}
    excess = 100 * (max(costs.values()) / min(costs.values()) - 1)
    values = ", ".join(f"{label} {measures.short_count(cost)}" for label, cost in costs.items())
    return f"{values}; the largest is {excess:.1f} % above the smallest" if unequal(arms, name) else ""


def layouts_of(run: Run) -> str:
    """In which layouts the steps of a run were computed, if there are several."""
    text = "from step {from_step} {strategy} with {world_size} rank{s} and accumulation {accumulation}"
    layouts = run.manifest.get("layouts") or []
    found = [text.format(**layout, s="s" * (layout["world_size"] != 1)) for layout in layouts]
    return ", ".join(found * (len(found) > 1))


def passed_over(run: Run) -> str:
    """Why a run could not go on from its newest checkpoints when it was started again."""
    passed = [each["reason"] for resume in run.manifest.get("resumes") or [] for each in resume["passed_over"]]
    return "; ".join(dict.fromkeys(passed))


def balance_sentence(comparison: Comparison) -> str:
    """Which sparse arms computed exactly even loads in every routing group that was logged; empty if none has any."""
    name = "train_group/max_vio/load/max"
    logged = {arm.label: [v for run in arm.runs for v in run.values(name)] for arm in comparison.arms if arm.sparse}
    worst = sorted((max(values), label) for label, values in logged.items() if values)
    even = [label for label in logged if (0.0, label) in worst]
    parts = [f"exactly even in {listed(even)}"] * bool(even)
    parts += [f"up to {value:.2f} above even in {label}" for value, label in worst[len(even) :][-MOST_NAMED:]]
    return f"The fullest expert of a routing group, worst logged step: {listed(parts)}." if parts else ""


def not_quiet(arms: Sequence[Arm]) -> dict[Arm, str]:
    """The sign at speeds and times that other work on the machine may have changed."""
    uncertain = {*machine_noise(arms), *measures.side_by_side(arms)}
    return {arm: NOT_QUIET * (arm in uncertain) for arm in arms}
