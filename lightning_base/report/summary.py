"""What the numbers say, in sentences. Every order of arms in them is computed."""

import statistics
from collections.abc import Sequence

from lightning_base.report.fairness import Arm, Comparison, execution, unequal
from lightning_base.report.measures import (
    final_loss,
    mean,
    over_seeds,
    result,
    short_count,
    under_unigram,
    unigram_entropy,
)
from lightning_base.report.read import Run
from lightning_base.report.table import causal_in, usual_mode


def summarize(comparison: Comparison, labels: Sequence[str]) -> list[str]:
    """A few sentences: the lowest loss, where BASE stands, what was learnt, and how far to trust it."""
    known = [
        (loss, label, arm)
        for label, arm in zip(labels, comparison.arms, strict=True)
        if (loss := mean(arm, final_loss)) is not None
    ]
    causal = [entry for entry in known if is_causal(entry[2])]
    ranked = sorted(causal or known, key=lambda entry: entry[0])
    sentences = [lowest(ranked), *where_base_stands(ranked), *not_ranked(known, causal), *learnt(comparison, labels)]
    sentences += trained_balance(comparison, labels)
    if len(ranked) > 1:
        sentences.append(noise(ranked))
    return sentences


# More names than these make a sentence unreadable.
MOST_NAMED = 4
Ranked = list[tuple[float, str, Arm]]


def lowest(ranked: Ranked) -> str:
    """Which arm has the lowest validation loss, and by how much."""
    best, label, _ = ranked[0]
    if len(ranked) == 1:
        return (
            f"{label} reaches a validation loss of {best:.4f} nats per token; there is no other arm to compare it with."
        )
    tied = [name for loss, name, _ in ranked if loss == best]
    if len(tied) > 1:
        return f"{listed(tied)} share the lowest validation loss, {best:.4f} nats per token."
    second, runner_up, _ = ranked[1]
    margin = f"{second - best:.4f} ({100 * (second - best) / second:.2f} %) below the next, {runner_up} ({second:.4f})"
    return f"{label} has the lowest validation loss: {best:.4f} nats per token, {margin}."


def is_causal(arm: Arm) -> bool:
    """Whether its validation loss is that of a language model, which does not look at later tokens."""
    return causal_in(arm, usual_mode(arm))


def not_ranked(known: Ranked, causal: Ranked) -> list[str]:
    """Which arms stand outside the ranking, and why."""
    others = [f"{label} ({loss:.4f})" for loss, label, arm in known if not is_causal(arm)]
    if not others:
        return []
    if not causal:
        return ["Every arm looks at later tokens in evaluation: none of these losses is that of a language model."]
    return [f"Not ranked, because later tokens change what earlier ones are given in evaluation: {listed(others)}."]


def where_base_stands(ranked: Ranked) -> list[str]:
    """BASE against every other arm, and what its balanced routing would have given."""
    mine = [entry for entry in ranked if entry[2].router == "BASE"]
    others = [entry for entry in ranked if entry[2].router != "BASE"]
    if not mine:
        return []
    loss, label, arm = mine[0]
    sentences = []
    if others:
        above = [(loss - other, name) for other, name, _ in others if other < loss]
        below = [(other - loss, name) for other, name, _ in others if other > loss]
        equal = [name for other, name, _ in others if other == loss]
        parts = [f"loses to {by_margin(above)}"] * bool(above) + [f"beats {by_margin(below)}"] * bool(below)
        parts += [f"equals {listed(equal)}"] * bool(equal)
        which = "" if len(mine) == 1 else f" (the best of its {len(mine)} arms, {label})"
        place = 1 + sum(other < loss for other, _, _ in ranked)
        sentences.append(f"BASE{which} is number {place} of {len(ranked)} with {loss:.4f}: it {' and '.join(parts)}.")
    balanced = mean(arm, result("final_balanced/loss"))
    if balanced is not None:
        change = "lower" if balanced < loss else "higher"
        sentences.append(
            f"Routed in balance instead of greedily, {label}'s loss on the same text is {balanced:.4f}, "
            f"{abs(loss - balanced):.4f} {change}; balancing looks at later tokens, so this does not count."
        )
    return sentences


def learnt(comparison: Comparison, labels: Sequence[str]) -> list[str]:
    """Each arm against what knowing the frequencies of the tokens alone would give."""
    entropy = mean(comparison.arms[0], unigram_entropy)
    if entropy is None:
        return []
    margins = [
        (margin, label)
        for label, arm in zip(labels, comparison.arms, strict=True)
        if (margin := mean(arm, under_unigram)) is not None
    ]
    above = [label for margin, label in margins if margin <= 0]
    text = f"Predicting every token from its frequency alone would cost {entropy:.4f} nats (unigram entropy)"
    if above:
        return [f"{text}; not below it: {listed(above)}."]
    (least, worst), (most, best) = min(margins), max(margins)
    return [f"{text}; {worst} is {least:.3f} below it" + (f", {best} {most:.3f}." if len(margins) > 1 else ".")]


def trained_balance(comparison: Comparison, labels: Sequence[str]) -> list[str]:
    """Which sparse arms computed exactly even loads in every routing group that was logged."""
    even: list[tuple[float, str]] = []
    uneven: list[tuple[float, str]] = []
    for label, arm in zip(labels, comparison.arms, strict=True):
        worst = over_seeds(arm, largest_violation)
        if worst and arm.first.ledger["num_experts"] > 1:
            (even if max(worst) == 0 else uneven).append((max(worst), label))
    if not even and not uneven:
        return []
    parts = [f"exactly even in {listed([label for _, label in even])}"] * bool(even)
    uneven.sort()
    if len(uneven) <= MOST_NAMED:
        parts += [f"up to {value:.2f} above even in {label}" for value, label in uneven]
    else:
        parts.append(
            f"up to {uneven[0][0]:.2f} ({uneven[0][1]}) to {uneven[-1][0]:.2f} ({uneven[-1][1]}) above even in the "
            f"{len(uneven)} others"
        )
    return [
        f"The fullest expert in training (max_vio of the load in a routing group, worst logged step): {listed(parts)}."
    ]


def largest_violation(run: Run) -> float | None:
    series = run.series.get("train_group/max_vio/load/max")
    return None if series is None else float(series.values.max())


def noise(ranked: Ranked) -> str:
    """How far the difference between the first two arms can be trusted."""
    (_, first, one), (_, second, other) = ranked[0], ranked[1]
    if len(one.seeds) == 1:
        return "Each arm was trained with one seed: differences of this size may be noise. Add seed=1,2,3 to know."
    pairs = zip(over_seeds(other, final_loss), over_seeds(one, final_loss), strict=True)
    gaps = [there - here for there, here in pairs]
    won = sum(gap > 0 for gap in gaps)
    return (
        f"Seed by seed, {first} is {statistics.fmean(gaps):.4f} ± {statistics.stdev(gaps):.4f} below {second} "
        f"(mean ± standard deviation over {len(gaps)} seeds), and below it in {won} of {len(gaps)}."
    )


def cautions(comparison: Comparison, labels: Sequence[str]) -> list[str]:
    """What makes the arms of a table unequal in cost or speed, or their code unknown."""
    found = []
    for name, words in (("flops_per_token", "active FLOPs per token"), ("active_parameters", "active parameters")):
        if unequal(comparison.arms, name):
            costs = [float(arm.first.ledger[name]) for arm in comparison.arms]
            values = [f"{label} {short_count(cost)}" for label, cost in zip(labels, costs, strict=True)]
            excess = 100 * (max(costs) / min(costs) - 1)
            found.append(f"Unequal {words}: {', '.join(values)}; the largest is {excess:.1f} % above the smallest.")
    ways = [execution(arm.first) for arm in comparison.arms]
    keys = sorted({key for way in ways for key in way if any(way.get(key) != other.get(key) for other in ways)})
    if keys:
        values = [
            f"{label} {', '.join(f'{key}={way.get(key)}' for key in keys)}"
            for label, way in zip(labels, ways, strict=True)
        ]
        found.append(f"Speeds are not comparable, the arms did not run in the same way: {'; '.join(values)}.")
    commit = comparison.setting.get("git_commit")
    if commit is None:
        found.append("The commit of the code is unknown: that all arms ran the same code is not certain.")
    elif str(commit).endswith("-dirty"):
        found.append("The code had uncommitted changes: that all arms ran the same code is not certain.")
    return found


def by_margin(margins: Sequence[tuple[float, str]]) -> str:
    """Names with their margins; of many, only how many and between which margins."""
    if len(margins) <= MOST_NAMED:
        return listed([f"{name} by {margin:.4f}" for margin, name in margins])
    return f"{len(margins)} arms by {min(margins)[0]:.4f} to {max(margins)[0]:.4f}"


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
