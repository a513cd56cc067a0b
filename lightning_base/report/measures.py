"""The numbers of an arm: what each is called, where it is read, and how it is written."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_base.report.fairness import Arm
from lightning_base.report.read import Run
from lightning_base.report.statistics import margin

DASH = "–"
Reader = Callable[[Run], float | None]
Form = Callable[[float], str]


@dataclass(frozen=True)
class Measure:
    """A column under a group of columns: ``read`` finds the number in a run, ``form`` writes it."""

    heading: str
    group: str
    read: Reader
    form: Form


def by_seed(arm: Arm, read: Reader) -> dict[int, float]:
    """A number for every seed that has it."""
    found = {run.seed: read(run) for run in arm.runs}
    return {seed: value for seed, value in found.items() if value is not None}


def mean(arm: Arm, read: Reader) -> float | None:
    """The mean over seeds, or None if no run has the number."""
    found = by_seed(arm, read)
    return float(np.mean(list(found.values()))) if found else None


def cell(arm: Arm, read: Reader, form: Form) -> str:
    """Mean, and half the width of its t interval where there are several seeds; a dash for a number not there."""
    found = list(by_seed(arm, read).values())
    if not found:
        return DASH
    text = form(float(np.mean(found)))
    # What never varies over seeds, such as a parameter count, needs no interval.
    if len(set(found)) > 1 and math.isfinite(half := margin(found)):
        text += f" ± {form(half)}"
    return text if len(found) == len(arm.runs) else f"{text} (n={len(found)})"


def field(part: str, name: str) -> Reader:
    """A number of the manifest, in its ``result`` or ``ledger``, or at its top for an empty ``part``."""

    def read(run: Run) -> float | None:
        value = ((run.manifest.get(part) or {}) if part else run.manifest).get(name)
        return None if value is None else float(value)

    return read


def last(name: str) -> Reader:
    return lambda run: run.last(name)


def logged(name: str) -> Reader:
    """The mean over all logged steps."""
    return lambda run: run.mean(name)


def steady(name: str) -> Reader:
    """The mean over logged steps after the first, which holds the warm-up; of the first if there is no other."""

    def read(run: Run) -> float | None:
        series = run.series.get(name)
        return (
            None if series is None else float(np.mean(series.values[1:] if len(series.values) > 1 else series.values))
        )

    return read


final_loss = field("result", "final/loss")
bits_per_byte = field("result", "final/bits_per_byte")
unigram_entropy = field("corpus", "unigram_entropy")


def under_unigram(run: Run) -> float | None:
    """How far the validation loss is under the unigram entropy; negative if it is above."""
    entropy, loss = unigram_entropy(run), final_loss(run)
    return None if entropy is None or loss is None else entropy - loss


def windows(run: Run) -> np.ndarray:
    """Tokens per second of the log windows after the first, which holds the first step and its warm-up."""
    series = run.series.get("train/tokens_per_second")
    return np.array([]) if series is None else series.values[1:]


def speed(run: Run) -> float | None:
    found = windows(run)
    return float(np.median(found)) if len(found) else None


def pooled_windows(arm: Arm) -> np.ndarray:
    return np.concatenate([windows(run) for run in arm.runs])


def speed_cell(arm: Arm) -> str:
    """The median of all windows of all seeds, with quartiles where there are several windows."""
    found = pooled_windows(arm)
    if not len(found):
        return DASH
    low, middle, high = np.quantile(found, (0.25, 0.5, 0.75))
    return whole(middle) + (f" ({whole(low)} to {whole(high)})" if len(found) > 1 else "")


def drop_rate(run: Run) -> float | None:
    asked = run.manifest["assignments"]
    return run.manifest["assignments_dropped"] / asked if asked else None


def thousand(read: Reader) -> Reader:
    """A number in thousandths of its unit."""
    return lambda run: None if (value := read(run)) is None else 1000 * value


def number(digits: int) -> Form:
    return lambda value: f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def signed(value: float) -> str:
    """A difference in nats: +0.0123 or −0.0123."""
    return f"{value:+.4f}".replace("-", "−")


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


QUALITY, COST, ROUTING = "Quality on held-out text", "Cost", "Routing in training"
ROUTED = (
    Measure("drop rate", "training", drop_rate, percent),
    Measure("max_vio", "training", logged("train_group/max_vio/load/mean"), number(3)),
    Measure("max_vio", "evaluation", last("final_pass/max_vio/load/mean"), number(3)),
)
FULL = (
    Measure("validation loss", QUALITY, final_loss, number(4)),
    Measure("under unigram", QUALITY, under_unigram, number(3)),
    Measure("perplexity", QUALITY, field("result", "final/perplexity"), number(1)),
    Measure("bits per byte", QUALITY, bits_per_byte, number(4)),
    Measure("tokens/s", "Speed", speed, whole),
    Measure("active parameters", COST, field("ledger", "active_parameters"), short_count),
    Measure("total parameters", COST, field("ledger", "parameters"), short_count),
    Measure("FLOPs/token", COST, field("ledger", "flops_per_token"), short_count),
    Measure("experts", ROUTING, field("ledger", "num_experts"), plain),
    Measure("k", ROUTING, field("ledger", "top_k"), plain),
    Measure("capacity factor", ROUTING, field("ledger", "capacity_factor"), plain),
    Measure("tokens", ROUTING, field("", "tokens"), whole),
    Measure("dropped", ROUTING, field("", "assignments_dropped"), whole),
    Measure("drop rate", ROUTING, drop_rate, percent),
)
LEAK = tuple(
    Measure(heading, f"routed as in {stage}", field("result", f"final_causality/leak_{stage}_{way}/max"), percent)
    for stage in ("training", "evaluation")
    for way, heading in (("expert", "chosen"), ("weight", "gates"), ("drop", "drops"), ("any", "any"))
)
PHASES = (
    "router",
    "assignment",
    "dispatch",
    "experts",
    "combine",
    "other_forward",
    "waiting",
    "backward_and_optimizer",
)
TIME = tuple(
    Measure(
        "expert networks" if phase == "experts" else phase.replace("_", " "),
        "share of a training step",
        steady(f"train_time/share_{phase}"),
        percent,
    )
    for phase in PHASES
)
STEP = "training, one step"
COMPUTE = (
    Measure("idle, over processes", STEP, steady("train_step/idle_fraction/mean"), percent),
    Measure("idle, over experts", STEP, steady("train_step/idle_fraction_experts/mean"), percent),
    Measure("batched padding", STEP, steady("train_micro_batch/batched_padding/mean"), percent),
    Measure("empty slots", STEP, steady("train_step/capacity_padding/mean"), percent),
    Measure("idle, over experts", "evaluation", last("final_pass/idle_fraction_experts/mean"), percent),
    Measure("idle time, over processes", "measured", steady("train_time/idle_fraction"), percent),
)
SENT, EXCHANGE = "bytes of a sparse layer, a step and a process", "time of the exchange"
COMMUNICATION = (
    Measure("sent", SENT, steady("communication/bytes/mean"), short_count),
    Measure("busiest process", SENT, steady("communication/busiest_rank/max"), number(3)),
    Measure("largest message", SENT, steady("communication/largest_message/max"), short_count),
    Measure("uneven dispatch", SENT, steady("communication/uneven_dispatch/max"), number(3)),
    Measure("ms a layer", EXCHANGE, thousand(steady("communication/seconds/mean")), number(2)),
    Measure("ms for the slowest", EXCHANGE, thousand(steady("communication/waiting/mean")), number(2)),
    Measure("share of the step", EXCHANGE, steady("communication/share"), percent),
    Measure("gradients", "computed", field("communication", "gradient_bytes_computed"), short_count),
)
ALL: Sequence[Measure] = (*FULL, *ROUTED[1:], *LEAK, *TIME, *COMPUTE, *COMMUNICATION)
