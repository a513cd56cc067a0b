"""The signs behind names and cells, and the footnotes that explain them."""

from collections.abc import Iterator

from lightning_base.report.fairness import Arm, Comparison, unequal
from lightning_base.report.quiet import machine_noise

NOT_CAUSAL_IN_TRAINING, NOT_CAUSAL_IN_EVALUATION, NOT_QUIET, OTHER_COST = "†", "‡", "§", "¶"


def marked(label: str, arm: Arm, mode: str | None = None) -> str:
    """The label with the signs of its footnotes; with a ``mode``, the sign for evaluation stands beside that."""
    training = "" if arm.causal_in(None) else NOT_CAUSAL_IN_TRAINING
    return label + training + ("" if arm.causal or mode else NOT_CAUSAL_IN_EVALUATION)


def footnotes(comparison: Comparison) -> Iterator[str]:
    """What the signs in the tables mean; only those that occur."""
    arms, modes = comparison.arms, [arm.causal_in(mode) for arm in comparison.arms for mode in arm.modes]
    if len(comparison.seeds) > 1:
        yield (
            "± is half the width of the 95 % t interval of the mean over seeds, here and in every table. Runs with the "
            "same seed read the same batches and start from the same shared weights, so a difference is taken seed by "
            "seed, and may be known better than the losses themselves."
        )
    if not all(arm.causal_in(None) for arm in arms):
        yield (
            f"{NOT_CAUSAL_IN_TRAINING} Not causal in training: there, a token's expert may depend on later tokens of "
            "its routing group, so its training loss does not compare. Its validation loss here is measured with "
            f"causal routing{f', unless marked {NOT_CAUSAL_IN_EVALUATION}' * (not all(modes))}."
        )
    if not all(modes):
        yield (
            f"{NOT_CAUSAL_IN_EVALUATION} Not causal in evaluation: tokens are routed with a view of later ones, so "
            "that a validation loss there is no loss of a language model."
        )
    if any(noise and noise.disturbed for noise in machine_noise(arms)):
        yield f"{NOT_QUIET} The machine was not quiet while this arm was trained: its speed and times are uncertain."
    if any(costs_more(comparison)):
        yield f"{OTHER_COST} Spends more or fewer FLOPs per token than the reference: a difference may be due to that."


def costs_more(comparison: Comparison) -> list[bool]:
    reference = comparison.arms[comparison.reference]
    return [unequal((arm, reference), "flops_per_token") for arm in comparison.arms]


def sign(arm: Arm, mode: str) -> str:
    return "" if arm.causal_in(mode) else NOT_CAUSAL_IN_EVALUATION
