"""The numbers of an arm: what each is called, where it is read, and how it is written.

Shapes: S validations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lightning_base.results.fairness import EXECUTED, Arm
from lightning_base.results.read import Run
from lightning_base.results.statistics import Interval, margin

DASH = "–"
Reader = Callable[[Run], float | None]
Form = Callable[[float], str]


def by_seed(arm: Arm, read: Reader) -> dict[int, float]:
    """A number for every seed that has it."""
    return {run.seed: value for run in arm.runs if (value := read(run)) is not None}


def mean(arm: Arm, read: Reader) -> float:
    """The mean over seeds, nan if no run has the number."""
    return float(np.mean(list(by_seed(arm, read).values()) or [math.nan]))


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


@dataclass(frozen=True)
class Column:
    """A column of a table; ``group`` stands above the headings of neighbours that share it.

    Of numbers: ``read`` finds them in a run, ``form`` writes them.
    """

    heading: str
    group: str = ""
    read: Reader = lambda run: None
    form: Form = str
    words: bool = False

    def cell(self, arm: Arm) -> str:
        return cell(arm, self.read, self.form)


def number(name: str, after: int = 0) -> Reader:
    """A field of the manifest, or the mean of a scalar, without the first steps for times: they hold the warm-up."""
    return lambda run: run.number(name, after)


final_loss, unigram_entropy = number("result.final/loss"), number("corpus.unigram_entropy")


def under_unigram(run: Run) -> float | None:
    """How far the validation loss is under the unigram entropy; negative if it is above."""
    entropy, loss = unigram_entropy(run), final_loss(run)
    return None if entropy is None or loss is None else entropy - loss


def drop_rate(run: Run) -> float | None:
    asked = run.manifest["assignments"]
    return run.manifest["assignments_dropped"] / asked if asked else None


def milliseconds(name: str) -> Reader:
    return lambda run: None if (value := run.number(name, after=1)) is None else 1000 * value


# Quality at equal cost: the validation curve of a run, read between its points.
CURVE = "validation/loss"
COSTS = ("steps", "FLOPs", "time")


def cost(run: Run, name: str) -> np.ndarray:
    """[S] what each validation had cost until then, in optimizer steps, FLOPs or seconds of training.

    FLOPs are steps * tokens per step * FLOPs per token.
    """
    curve, tokens_per_step = run.series[CURVE], run.manifest["tokens"] / run.manifest["steps"]
    flops_S = curve.steps * tokens_per_step * run.ledger["flops_per_token"]
    return {"steps": curve.steps, "FLOPs": flops_S, "time": curve.seconds}[name]


def validated(arms: Sequence[Arm]) -> list[Run]:
    return [run for arm in arms for run in arm.runs if CURVE in run.series]


def loss_at(run: Run, name: str, spent: float) -> float | None:
    """The validation loss when so much was spent, between two validations linearly; none before the first."""
    before = CURVE not in run.series or spent < cost(run, name)[0]
    return None if before else float(np.interp(spent, cost(run, name), run.series[CURVE].values))


def seconds_to(run: Run, loss: float) -> float | None:
    """Seconds of training until the curve first is at a loss or below, between two validations linearly.

    None for a run that never is, or that is below at its first validation already.
    """
    curve = run.series.get(CURVE)
    if curve is None or curve.values.min() > loss or curve.values[0] < loss:
        return None
    i = int(np.argmax(curve.values <= loss))
    part = slice(max(i - 1, 0), i + 1)
    return float(np.interp(-loss, -curve.values[part], curve.seconds[part]))


# How fast arms trained, and whether that compares.
TOLERANCE, ENOUGH, QUARTILES = 0.1, 4, (0.25, 0.5, 0.75)


def quartiles(runs: Sequence[Run]) -> list[float]:
    """Of tokens per second over the log windows after the first, which holds the warm-up; [] if there is none."""
    found = [pace for run in runs for pace in run.values("train/tokens_per_second")[1:]]
    return np.quantile(found, QUARTILES).tolist() if found else []


def speed(run: Run) -> float | None:
    found = quartiles([run])
    return found[1] if found else None


class Noise(NamedTuple):
    """A fixed piece of work, timed between steps, took longer or was less even than beside the quietest arm.

    It took ``slower`` times as long, ``spread`` is quartile distance / median. ``scaled`` is what the speed might be on
    a quiet machine; None where that would be a guess from a few timings.
    """

    slower: float
    spread: float
    scaled: float | None


def machine_noise(arms: Sequence[Arm]) -> dict[Arm, Noise]:
    """The noise beside the arms that had some; those that ran in other ways are held apart."""
    every = {arm: [time for run in arm.runs for time in run.values("machine/reference_ms")] for arm in arms}
    timed, found = {arm: times for arm, times in every.items() if times}, {}
    for arm, mine in timed.items():
        way = arm.first.chosen(EXECUTED)
        alike = [times for other, times in timed.items() if other.first.chosen(EXECUTED) == way]
        (low, middle, high), quiet = (np.quantile(x, QUARTILES) for x in (mine, min(alike, key=np.median)))
        slower, spread, least = middle / quiet[1], (high - low) / middle, (quiet[2] - quiet[0]) / quiet[1]
        if slower > 1 + TOLERANCE or spread > least + TOLERANCE:
            pace = quartiles(arm.runs) if len(mine) >= ENOUGH else []
            found[arm] = Noise(slower, spread, pace[1] * slower if pace else None)
    return found


def side_by_side(arms: Sequence[Arm]) -> list[Arm]:
    """The arms of which a run was under way on the same machine while another of these runs was."""
    runs = [run.status for arm in arms for run in arm.runs if {"host", "started", "updated"} <= set(run.status)]

    def shares(one: dict[str, Any]) -> bool:
        others = [other for other in runs if other is not one and other["host"] == one["host"]]
        return any(max(one["started"], other["started"]) < min(one["updated"], other["updated"]) for other in others)

    return [arm for arm in arms if any(shares(run.status) for run in arm.runs if run.status in runs)]


def signed(value: float) -> str:
    """A difference in nats: +0.0123 or −0.0123."""
    return f"{value:+.4f}".replace("-", "−")


def paired(gap: Interval) -> str:
    """The same with its margin; with one seed the number alone."""
    return signed(gap.mean) + (f" ± {gap.margin:.4f}" if gap.known else "")


def short_count(value: float) -> str:
    """Four digits and a unit: 8.663 M."""
    power = sum(abs(value) >= 1000**i for i in range(1, 6))
    return f"{value / 1000**power:#.4g} {' kMGTP'[power]}" if power else f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


ONE, TWO, THREE, FOUR = (f"{{:.{digits}f}}".format for digits in (1, 2, 3, 4))
WHOLE, PLAIN = "{:,.0f}".format, "{:g}".format
QUALITY, COST, ROUTING, STEP = "Quality on held-out text", "Cost", "Routing in training", "training, one step"
LOSS = Column("validation loss", QUALITY, final_loss, FOUR)
BITS = Column("bits per byte", QUALITY, number("result.final/bits_per_byte"), FOUR)
FULL = (
    LOSS,
    Column("under unigram", QUALITY, under_unigram, THREE),
    Column("perplexity", QUALITY, number("result.final/perplexity"), ONE),
    BITS,
    Column("tokens/s", "Speed", speed, WHOLE),
    Column("active parameters", COST, number("ledger.active_parameters"), short_count),
    Column("total parameters", COST, number("ledger.parameters"), short_count),
    Column("FLOPs/token", COST, number("ledger.flops_per_token"), short_count),
    Column("experts", ROUTING, number("ledger.num_experts"), PLAIN),
    Column("k", ROUTING, number("ledger.top_k"), PLAIN),
    Column("capacity factor", ROUTING, number("ledger.capacity_factor"), PLAIN),
    Column("tokens", ROUTING, number("tokens"), WHOLE),
    Column("dropped", ROUTING, number("assignments_dropped"), WHOLE),
    Column("drop rate", ROUTING, drop_rate, percent),
)
ROUTED = (
    Column("drop rate", "training", drop_rate, percent),
    Column("max_vio", "training", number("train_group/max_vio/load/mean"), THREE),
    Column("max_vio", "evaluation", number("final_pass/max_vio/load/mean"), THREE),
)
LEAK = tuple(
    Column(heading, f"routed as in {stage}", number(f"result.final_causality/leak_{stage}_{way}/max"), percent)
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
    Column(NAMES[phase], "share of a training step", number(f"train_time/share_{phase}", 1), percent)
    for phase in PHASES
)
COMPUTE = (
    Column("idle, over processes", STEP, number("train_step/idle_fraction/mean", 1), percent),
    Column("idle, over experts", STEP, number("train_step/idle_fraction_experts/mean", 1), percent),
    Column("batched padding", STEP, number("train_micro_batch/batched_padding/mean", 1), percent),
    Column("empty slots", STEP, number("train_step/capacity_padding/mean", 1), percent),
    Column("idle, over experts", "evaluation", number("final_pass/idle_fraction_experts/mean"), percent),
    Column("idle time, over processes", "measured", number("train_time/idle_fraction", 1), percent),
)
SENT, EXCHANGE = "bytes of a sparse layer, a step and a process", "time of the exchange"
COMMUNICATION = (
    Column("sent", SENT, number("communication/bytes/mean", 1), short_count),
    Column("busiest process", SENT, number("communication/busiest_rank/max", 1), THREE),
    Column("largest message", SENT, number("communication/largest_message/max", 1), short_count),
    Column("uneven dispatch", SENT, number("communication/uneven_dispatch/max", 1), THREE),
    Column("ms a layer", EXCHANGE, milliseconds("communication/seconds/mean"), TWO),
    Column("ms for the slowest", EXCHANGE, milliseconds("communication/waiting/mean"), TWO),
    Column("share of the step", EXCHANGE, number("communication/share", 1), percent),
    Column("gradients", "computed", number("communication.gradient_bytes_computed"), short_count),
)
ALL: Sequence[Column] = (*FULL, *ROUTED[1:], *LEAK, *TIME, *COMPUTE, *COMMUNICATION)
