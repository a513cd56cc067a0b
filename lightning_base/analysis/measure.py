"""From routed text to what each sparse layer's experts do.

Shapes: T tokens, E experts, L labels, V vocabulary, D domains.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_base.analysis.route import Text
from lightning_base.metrics.specialization import (
    Choices,
    concentration,
    information,
    label_counts,
    label_totals,
    pair_counts,
    saturation,
    shuffled,
    switch_fraction,
)

# A label of fewer tokens says little about what an expert likes.
LEAST = 10


@dataclass(frozen=True)
class Labelled:
    """How one kind of label is spread over the experts of a layer.

    Args:
        counts: [E, L], N(i, label).
        totals: [L], N(label).
        control: [E, L], N(i, label) with the labels given to random tokens.
        concentration: share of the tokens that reach the favourite expert of their label; labels of `LEAST` tokens on.
        by_chance: the same with the labels given to random tokens.
        information: I(expert; label) / H(expert), how much of the assignment the label explains.
        information_by_chance: the same with the labels given to random tokens.
    """

    counts: Int64[Tensor, "E L"]
    totals: Int64[Tensor, " L"]
    control: Int64[Tensor, "E L"]
    concentration: float
    by_chance: float
    information: float
    information_by_chance: float


@dataclass(frozen=True)
class Moment:
    """A layer's routing at one checkpoint, held against the newest one and against the one before.

    Args:
        step: of the checkpoint.
        saturation: overlap with the newest checkpoint's experts.
        previous_step: of the checkpoint before; None for the oldest.
        switch_fraction: share of tokens whose experts changed since then; None for the oldest.
    """

    step: int
    saturation: float
    previous_step: int | None
    switch_fraction: float | None


@dataclass(frozen=True)
class LayerFindings:
    """Everything measured about one sparse layer at the newest checkpoint, and how it got there.

    ``pairs`` [E, E] is N(i and j), with N(i) on the diagonal.
    """

    name: str
    choices: Choices
    domains: Labelled
    tokens: Labelled
    preceding: Labelled
    pairs: Int64[Tensor, "E E"]
    moments: list[Moment]

    @property
    def even_share(self) -> float:
        """k/E: the share of any label at each expert if nothing is preferred."""
        return self.choices.asked / (self.choices.num_tokens * self.choices.num_experts)

    @property
    def has_pairs(self) -> bool:
        """Whether any token has more than one expert."""
        return bool(self.pairs.sum() > self.pairs.diagonal().sum())

    @property
    def dropped(self) -> float:
        """Share of the assignments asked for that were dropped."""
        return 1 - len(self.choices.token_index) / self.choices.asked


@dataclass(frozen=True)
class Findings:
    """What was measured, per layer, and on what."""

    text: Text
    steps: list[int]
    layers: list[LayerFindings]

    @property
    def newest(self) -> int:
        """The step whose routing is analysed."""
        return self.steps[-1]


def measure(text: Text, routed: Iterable[tuple[int, dict[str, Choices]]]) -> Findings:
    """Measures all layers at all checkpoints.

    Args:
        text: the tokens that were routed.
        routed: step and choices per layer: the newest checkpoint first, then the others, the oldest first.
    """
    steps_and_choices = iter(routed)
    newest, final = next(steps_and_choices)
    moments: dict[str, list[Moment]] = {layer: [] for layer in final}
    steps: list[int] = []
    previous: dict[str, Choices] | None = None
    for step, choices in chain(steps_and_choices, [(newest, final)]):
        for layer, now in choices.items():
            switched = None if previous is None else switch_fraction(previous[layer], now)
            before = steps[-1] if steps else None
            moments[layer].append(Moment(step, saturation(now, final[layer]), before, switched))
        previous = choices
        steps.append(step)
    layers = [measure_layer(name, text, choices, moments[name]) for name, choices in final.items()]
    return Findings(text, steps, layers)


def measure_layer(name: str, text: Text, choices: Choices, moments: list[Moment]) -> LayerFindings:
    """One layer at the newest checkpoint."""
    return LayerFindings(
        name=name,
        choices=choices,
        domains=labelled(choices, text.domain, len(text.domains)),
        tokens=labelled(choices, text.tokens, text.vocab_size),
        preceding=labelled(choices, text.preceding, text.vocab_size),
        pairs=pair_counts(choices),
        moments=moments,
    )


def labelled(choices: Choices, labels_T: Int64[Tensor, " T"], num_labels: int) -> Labelled:
    """Counts one kind of label, and the same labels at random places."""
    counts_EL = label_counts(choices, labels_T, num_labels)
    totals_L = label_totals(labels_T, num_labels)
    control_EL = label_counts(choices, shuffled(labels_T), num_labels)
    return Labelled(
        counts=counts_EL,
        totals=totals_L,
        control=control_EL,
        concentration=concentration(counts_EL, totals_L, LEAST),
        by_chance=concentration(control_EL, totals_L, LEAST),
        information=information(counts_EL),
        information_by_chance=information(control_EL),
    )


def busiest(totals_L: Int64[Tensor, " L"], most: int) -> list[int]:
    """The labels of most tokens, at most ``most`` of them, without those of none."""
    order_L = torch.argsort(totals_L, descending=True, stable=True)[:most]
    return [int(label) for label in order_L if totals_L[label] > 0]
