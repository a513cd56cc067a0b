"""The numbers of an arm: what each is called, how it is defined, and where it is read."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_base.report.fairness import Arm
from lightning_base.report.read import Run

DASH = "–"
Reader = Callable[[Run], float | None]


@dataclass(frozen=True)
class Measure:
    """A column: ``read`` finds the number in a run, ``form`` writes it, ``help`` says how to read it."""

    heading: str
    group: str
    help: str
    read: Reader
    form: Callable[[float], str]


def over_seeds(arm: Arm, read: Reader) -> list[float]:
    """A number for every seed that has it."""
    found = (read(run) for run in arm.runs)
    return [value for value in found if value is not None]


def mean(arm: Arm, read: Reader) -> float | None:
    """The mean over seeds, or None if no run has the number."""
    found = over_seeds(arm, read)
    return statistics.fmean(found) if found else None


def cell(arm: Arm, read: Reader, form: Callable[[float], str]) -> str:
    """Mean, and the sample standard deviation where there are several seeds; a dash for a number not there."""
    found = over_seeds(arm, read)
    if not found:
        return DASH
    text = form(statistics.fmean(found))
    spread = statistics.stdev(found) if len(found) > 1 and all(map(math.isfinite, found)) else 0.0
    # What never varies over seeds, such as a parameter count, needs no spread.
    if len(found) > 1 and spread > 0:
        text += f" ± {form(spread)}"
    return text if len(found) == len(arm.runs) else f"{text} (n={len(found)})"


def result(name: str) -> Reader:
    def read(run: Run) -> float | None:
        value = run.manifest["result"].get(name)
        return None if value is None else float(value)

    return read


def ledger(name: str) -> Reader:
    def read(run: Run) -> float | None:
        value = run.ledger.get(name)
        return None if value is None else float(value)

    return read


def manifest(name: str) -> Reader:
    def read(run: Run) -> float | None:
        value = run.manifest.get(name)
        return None if value is None else float(value)

    return read


def final_loss(run: Run) -> float | None:
    return result("final/loss")(run)


def unigram_entropy(run: Run) -> float | None:
    """Nats per token of the validation text if all that is known is how frequent each token is in the training text."""
    found = (run.manifest.get("corpus") or {}).get("unigram_entropy")
    return None if found is None else float(found)


def under_unigram(run: Run) -> float | None:
    """How far the validation loss is under the unigram entropy; negative if it is above."""
    entropy, loss = unigram_entropy(run), final_loss(run)
    return None if entropy is None or loss is None else entropy - loss


def speed(run: Run) -> float | None:
    """Median tokens per second over the log windows after the first, which holds the first step and its warm-up."""
    series = run.series.get("train/tokens_per_second")
    return None if series is None or len(series.values) < 2 else float(np.median(series.values[1:]))


def drop_rate(run: Run) -> float | None:
    asked = run.manifest["assignments"]
    return run.manifest["assignments_dropped"] / asked if asked else None


def number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def whole(value: float) -> str:
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """Four digits and a unit: 8.663 M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:#.4g} {unit}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def plain(value: float) -> str:
    return f"{value:g}"


QUALITY, SPEED, COST, ROUTING = "Quality on held-out text", "Speed", "Cost", "Routing in training"

MEASURES: Sequence[Measure] = (
    Measure(
        "validation loss",
        QUALITY,
        "mean negative log-likelihood per token [nats] over the whole validation text after the last step, routed as "
        "in use (final/loss); lower is better",
        final_loss,
        number(4),
    ),
    Measure(
        "under unigram",
        QUALITY,
        "unigram entropy minus validation loss [nats]; the unigram entropy is the cross-entropy of the validation "
        "tokens under their frequencies in the training text: above 0, more was learnt than how frequent each token is",
        under_unigram,
        number(3),
    ),
    Measure("perplexity", QUALITY, "exp(validation loss)", result("final/perplexity"), number(1)),
    Measure(
        "bits per byte",
        QUALITY,
        "summed negative log-likelihood / ln 2 / bytes of text; does not depend on the tokenizer",
        result("final/bits_per_byte"),
        number(4),
    ),
    Measure(
        "tokens/s",
        SPEED,
        "training tokens per second, all processes together: median over the log windows after the first; validation "
        "and checkpoints excluded",
        speed,
        whole,
    ),
    Measure(
        "active parameters",
        COST,
        "parameters that one token meets: all but the experts, plus top_k of the num_experts experts",
        ledger("active_parameters"),
        short_count,
    ),
    Measure("total parameters", COST, "all parameters", ledger("parameters"), short_count),
    Measure(
        "FLOPs/token",
        COST,
        "floating-point operations of the matrix products of one training step, forward and backward, per token, "
        "counted on a real batch and scaled to no dropped token",
        ledger("flops_per_token"),
        short_count,
    ),
    Measure("experts", ROUTING, "E, experts per sparse layer", ledger("num_experts"), plain),
    Measure("k", ROUTING, "experts that every token asks for", ledger("top_k"), plain),
    Measure(
        "capacity factor",
        ROUTING,
        "an expert takes at most ceil(capacity factor * T k / E) of the T tokens of a routing group; a dash: no limit "
        "(Switch, arXiv 2101.03961)",
        ledger("capacity_factor"),
        plain,
    ),
    Measure("tokens", ROUTING, "tokens trained on, padding excluded", manifest("tokens"), whole),
    Measure(
        "dropped",
        ROUTING,
        "token-expert pairs, over all sparse layers and steps, that found their expert full",
        manifest("assignments_dropped"),
        whole,
    ),
    Measure(
        "drop rate",
        ROUTING,
        "dropped / assignments asked for (tokens * k * layers, or fewer where tokens may ask for fewer)",
        drop_rate,
        percent,
    ),
)


def leak(run: Run) -> float | None:
    """The share of earlier tokens that hear of later ones in the way of evaluation that counts."""
    return result("final_causality/leak_evaluation_any/max")(run)


def fullest_expert(run: Run) -> float | None:
    return run.mean("train_group/max_vio/load/mean")


BY_HEADING = {measure.heading: measure for measure in MEASURES}
SUMMARY: Sequence[Measure] = (
    *(BY_HEADING[heading] for heading in ("validation loss", "under unigram", "tokens/s", "FLOPs/token", "k")),
    Measure(
        "max_vio",
        ROUTING,
        "(max n - mean n) / mean n of the load in a routing group, mean over layers and logged steps; 0 is even",
        fullest_expert,
        number(3),
    ),
    BY_HEADING["drop rate"],
    Measure(
        "leak",
        "Evaluation",
        "share of earlier tokens whose expert, gate or drop changes when only later tokens change, worst layer; above "
        "0, the validation loss is not that of a language model",
        leak,
        percent,
    ),
)
