"""The numbers of an arm: what each is called, where it is read, and how it is written.

Shapes: S validations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_base.report.fairness import Arm
from lightning_base.report.read import Run
from lightning_base.report.speed import speed
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

    def cell(self, arm: Arm) -> str:
        return cell(arm, self.read, self.form)


def by_seed(arm: Arm, read: Reader) -> dict[int, float]:
    """A number for every seed that has it."""
    return {run.seed: value for run in arm.runs if (value := read(run)) is not None}


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


def logged(name: str, after: int = 0) -> Reader:
    """The mean over logged steps, ``after`` the first for times: it holds the warm-up."""
    return lambda run: run.mean(name, after)


def thousand(read: Reader) -> Reader:
    """A number in thousandths of its unit."""
    return lambda run: None if (value := read(run)) is None else 1000 * value


final_loss = field("result", "final/loss")
unigram_entropy = field("corpus", "unigram_entropy")


def under_unigram(run: Run) -> float | None:
    """How far the validation loss is under the unigram entropy; negative if it is above."""
    entropy, loss = unigram_entropy(run), final_loss(run)
    return None if entropy is None or loss is None else entropy - loss


def drop_rate(run: Run) -> float | None:
    asked = run.manifest["assignments"]
    return run.manifest["assignments_dropped"] / asked if asked else None


# Quality at equal cost: the validation curve of a run, read between its points.
CURVE = "validation/loss"
COSTS = ("steps", "FLOPs", "time")


def flops_until(run: Run, steps: np.ndarray) -> np.ndarray:
    """FLOPs spent until each step: steps * tokens per step * FLOPs per token."""
    return steps * (run.manifest["tokens"] / run.manifest["steps"]) * float(run.ledger["flops_per_token"])


def cost(run: Run, name: str) -> np.ndarray:
    """[S] what each validation had cost until then, in optimizer steps, FLOPs or seconds of training."""
    curve = run.series[CURVE]
    return {"steps": curve.steps, "FLOPs": flops_until(run, curve.steps), "time": curve.seconds}[name]


def validated(arms: Sequence[Arm]) -> list[Run]:
    return [run for arm in arms for run in arm.runs if CURVE in run.series]


def loss_at(name: str, spent: float) -> Reader:
    """The validation loss when so much was spent, between two validations linearly; none before the first."""

    def read(run: Run) -> float | None:
        before = CURVE not in run.series or spent < cost(run, name)[0]
        return None if before else float(np.interp(spent, cost(run, name), run.series[CURVE].values))

    return read


def seconds_to(loss: float) -> Reader:
    """Seconds of training until the curve first is at a loss or below, between two validations linearly.

    None for a run that never is, or that is below at its first validation already.
    """

    def read(run: Run) -> float | None:
        curve = run.series.get(CURVE)
        if curve is None or curve.values.min() > loss or curve.values[0] < loss:
            return None
        i = int(np.flatnonzero(curve.values <= loss)[0])
        part = slice(max(i - 1, 0), i + 1)
        return float(np.interp(-loss, -curve.values[part], curve.seconds[part]))

    return read


def signed(value: float) -> str:
    """A difference in nats: +0.0123 or −0.0123."""
    return f"{value:+.4f}".replace("-", "−")


def short_count(value: float) -> str:
    """Four digits and a unit: 8.663 M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:#.4g} {unit}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


ONE, TWO, THREE, FOUR = (f"{{:.{digits}f}}".format for digits in (1, 2, 3, 4))
WHOLE, PLAIN = "{:,.0f}".format, "{:g}".format
QUALITY, COST, ROUTING, STEP = "Quality on held-out text", "Cost", "Routing in training", "training, one step"
LOSS = Measure("validation loss", QUALITY, final_loss, FOUR)
BITS = Measure("bits per byte", QUALITY, field("result", "final/bits_per_byte"), FOUR)
FULL = (
    LOSS,
    Measure("under unigram", QUALITY, under_unigram, THREE),
    Measure("perplexity", QUALITY, field("result", "final/perplexity"), ONE),
    BITS,
    Measure("tokens/s", "Speed", speed, WHOLE),
    Measure("active parameters", COST, field("ledger", "active_parameters"), short_count),
    Measure("total parameters", COST, field("ledger", "parameters"), short_count),
    Measure("FLOPs/token", COST, field("ledger", "flops_per_token"), short_count),
    Measure("experts", ROUTING, field("ledger", "num_experts"), PLAIN),
    Measure("k", ROUTING, field("ledger", "top_k"), PLAIN),
    Measure("capacity factor", ROUTING, field("ledger", "capacity_factor"), PLAIN),
    Measure("tokens", ROUTING, field("", "tokens"), WHOLE),
    Measure("dropped", ROUTING, field("", "assignments_dropped"), WHOLE),
    Measure("drop rate", ROUTING, drop_rate, percent),
)
ROUTED = (
    Measure("drop rate", "training", drop_rate, percent),
    Measure("max_vio", "training", logged("train_group/max_vio/load/mean"), THREE),
    Measure("max_vio", "evaluation", last("final_pass/max_vio/load/mean"), THREE),
)
LEAK = tuple(
    Measure(heading, f"routed as in {stage}", field("result", f"final_causality/leak_{stage}_{way}/max"), percent)
    for stage in ("training", "evaluation")
    for way, heading in (("expert", "chosen"), ("weight", "gates"), ("drop", "drops"), ("any", "any"))
)
# The parts of a step with their colours: those of the sparse layers first.
PHASES = {
    "router": "#0072B2",
    "assignment": "#56B4E9",
    "dispatch": "#009E73",
    "experts": "#D55E00",
    "combine": "#E69F00",
    "other_forward": "#BBBBBB",
    "waiting": "#CC79A7",
    "backward_and_optimizer": "#777777",
}
NAMES = {phase: phase.replace("_", " ") for phase in PHASES} | {"experts": "expert networks"}
TIME = tuple(
    Measure(NAMES[phase], "share of a training step", logged(f"train_time/share_{phase}", 1), percent)
    for phase in PHASES
)
COMPUTE = (
    Measure("idle, over processes", STEP, logged("train_step/idle_fraction/mean", 1), percent),
    Measure("idle, over experts", STEP, logged("train_step/idle_fraction_experts/mean", 1), percent),
    Measure("batched padding", STEP, logged("train_micro_batch/batched_padding/mean", 1), percent),
    Measure("empty slots", STEP, logged("train_step/capacity_padding/mean", 1), percent),
    Measure("idle, over experts", "evaluation", last("final_pass/idle_fraction_experts/mean"), percent),
    Measure("idle time, over processes", "measured", logged("train_time/idle_fraction", 1), percent),
)
SENT, EXCHANGE = "bytes of a sparse layer, a step and a process", "time of the exchange"
COMMUNICATION = (
    Measure("sent", SENT, logged("communication/bytes/mean", 1), short_count),
    Measure("busiest process", SENT, logged("communication/busiest_rank/max", 1), THREE),
    Measure("largest message", SENT, logged("communication/largest_message/max", 1), short_count),
    Measure("uneven dispatch", SENT, logged("communication/uneven_dispatch/max", 1), THREE),
    Measure("ms a layer", EXCHANGE, thousand(logged("communication/seconds/mean", 1)), TWO),
    Measure("ms for the slowest", EXCHANGE, thousand(logged("communication/waiting/mean", 1)), TWO),
    Measure("share of the step", EXCHANGE, logged("communication/share", 1), percent),
    Measure("gradients", "computed", field("communication", "gradient_bytes_computed"), short_count),
)
ALL: Sequence[Measure] = (*FULL, *ROUTED[1:], *LEAK, *TIME, *COMPUTE, *COMMUNICATION)
