"""Tables as plain cells, before anyone decides between HTML, Markdown, LaTeX and a terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_base.report.answer import all_contrasts, balance_sentence, contrasts
from lightning_base.report.curves import COSTS, budget, loss_at, reached_by_all, seconds_to
from lightning_base.report.fairness import Comparison, stage_of
from lightning_base.report.marks import NOT_QUIET, OTHER_COST, costs_more, marked, sign
from lightning_base.report.measures import (
    COMMUNICATION,
    COMPUTE,
    DASH,
    FULL,
    LEAK,
    ROUTED,
    TIME,
    Measure,
    bits_per_byte,
    by_seed,
    cell,
    field,
    final_loss,
    last,
    logged,
    number,
    percent,
    pooled_windows,
    short_count,
    signed,
    speed_cell,
    whole,
)
from lightning_base.report.quiet import machine_noise
from lightning_base.report.statistics import interval
from lightning_base.report.words import COMMUNICATION_LEAD, COMPUTE_LEAD, CONTRAST_LEAD, GAP_LEAD, LEAK_LEAD, TIME_LEAD


@dataclass(frozen=True)
class Column:
    """``group`` stands above the headings of neighbours that share it."""

    heading: str
    group: str = ""
    words: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row is its heading. ``strong`` holds (row, column) of what is beyond noise.

    ``lead`` says, above the table, what was measured; ``figures`` are the beginnings of the names of figures that
    belong to it; ``help`` explains the headings that stand here for the first time.
    """

    title: str
    columns: list[Column]
    rows: list[list[str]]
    strong: frozenset[tuple[int, int]] = frozenset()
    lead: str = ""
    figures: tuple[str, ...] = ()
    help: tuple[tuple[str, str], ...] = ()

    @property
    def headings(self) -> list[str]:
        """For formats with one line of headings: one that stands under several groups says which."""
        names = [column.heading for column in self.columns]
        return [
            f"{column.group.partition(':')[0]} {column.heading}" if names.count(column.heading) > 1 else column.heading
            for column in self.columns
        ]


def tables(comparison: Comparison, labels: Sequence[str]) -> list[Table]:
    """The short table, and after it those that fold; tables that have nothing to say about these arms are left out."""
    found = [
        short_table(comparison, labels),
        contrast_table(comparison, labels),
        equal_cost_table(comparison, labels),
        measure_table("Quality, speed and cost; loss against speed", FULL, comparison, labels, figures=("pareto",)),
        balance_table(comparison, labels),
        measure_table("Who would wait, and what would be padding?", COMPUTE, comparison, labels, COMPUTE_LEAD),
        gap_table(comparison, labels),
        measure_table("Does routing look ahead?", LEAK, comparison, labels, LEAK_LEAD),
        measure_table("Where does the time of a step go?", TIME, comparison, labels, TIME_LEAD, ("step_time",)),
        measure_table("What does sending tokens cost?", COMMUNICATION, comparison, labels, COMMUNICATION_LEAD),
        alarm_table(comparison, labels),
    ]
    return [table for table in found if table.rows]


def short_table(comparison: Comparison, labels: Sequence[str]) -> Table:
    """The few numbers to look at first: one row per arm."""
    arms, noises, other_cost = comparison.arms, machine_noise(comparison.arms), costs_more(comparison)
    found = {c.arm: c for c in contrasts(comparison, comparison.reference, range(len(arms)))}
    seeds, several = len(comparison.seeds), len(comparison.seeds) > 1
    scaled = any(noise and noise.scaled(1.0) for noise in noises)
    against = f"against {labels[comparison.reference]}"
    columns = [Column("arm"), *[Column("seeds")] * several, Column("validation loss")]
    columns += [Column("difference", against)] * (len(arms) > 1)
    columns += [Column("p", against), Column("between seeds")] if several else []
    columns += [Column("bits per byte"), Column("tokens/s"), *[Column("scaled tokens/s")] * scaled]
    columns += [Column(measure.heading, measure.group) for measure in ROUTED]
    rows, strong = [], set()
    for i, (label, arm, noise) in enumerate(zip(labels, arms, noises, strict=True)):
        contrast, flag = found.get(i), NOT_QUIET if noise and noise.disturbed else ""
        losses = [loss for loss in by_seed(arm, final_loss).values() if math.isfinite(loss)]
        row = [marked(label, arm) + OTHER_COST * other_cost[i]]
        row += [str(len(arm.runs)) if len(arm.runs) == seeds else f"{len(arm.runs)} of {seeds}"] * several
        row += [cell(arm, final_loss, number(4))]
        if contrast and contrast.decided:
            strong.add((i, len(row)))
        row += [contrast.text if contrast else DASH] * (len(arms) > 1)
        if several:
            row += [f"{contrast.p:.3f}" if contrast and contrast.interval.known else DASH]
            row += [f"{interval(losses).spread:.4f}" if len(losses) > 1 else DASH]
        row += [cell(arm, bits_per_byte, number(4)), speed_cell(arm) + flag]
        pace = pooled_windows(arm)
        quiet = noise.scaled(float(np.median(pace))) if noise and len(pace) else None
        row += ["" if quiet is None else whole(quiet)] * scaled
        rows.append([*row, *(cell(arm, measure.read, measure.form) for measure in ROUTED)])
    return Table("The arms", columns, rows, frozenset(strong), figures=("difference",))


def contrast_table(comparison: Comparison, labels: Sequence[str]) -> Table:
    """Every paired difference with both of its intervals; nothing for one seed."""
    rows: list[list[str]] = []
    strong = set()
    for contrast in all_contrasts(comparison):
        gap = contrast.interval
        if not gap.known:
            continue
        low, high = gap.bootstrap()
        if contrast.decided:
            strong.add((len(rows), 2))
        row = [marked(labels[contrast.arm], comparison.arms[contrast.arm]), labels[contrast.other], contrast.text]
        row += [f"{signed(gap.low)} to {signed(gap.high)}", f"{signed(low)} to {signed(high)}", f"{contrast.p:.4f}"]
        rows.append([*row, f"{sum(value < 0 for value in gap.values)} of {gap.n}"])
    columns = [Column("arm"), Column("held against", words=True)]
    columns += [Column(name) for name in ("difference", "t interval", "bootstrap", "p", "better in")]
    return Table("Paired differences: t and bootstrap intervals", columns, rows, frozenset(strong), CONTRAST_LEAD)


def equal_cost_table(comparison: Comparison, labels: Sequence[str]) -> Table:
    """The validation loss after equal steps, FLOPs and time, and the time to a loss that all reach."""
    sampled = comparison.arms[0].first.config.get("data", {}).get("validation_sequences")
    title, arms, reference = (
        "Quality at equal steps, FLOPs and time; learning curves",
        comparison.arms,
        comparison.reference,
    )
    ranked = [arm for arm in arms if arm.causal] or arms
    target = reached_by_all(ranked)
    budgets = {name: spent for name in COSTS if (spent := budget(arms, name)) is not None}
    if target is None or not budgets:
        return Table(title, [], [])
    readers = {name: loss_at(name, spent) for name, spent in budgets.items()}
    found = {n: {c.arm: c for c in contrasts(comparison, reference, range(len(arms)), readers[n])} for n in readers}
    flags = [NOT_QUIET if noise and noise.disturbed else "" for noise in machine_noise(arms)]
    against = f"difference to {labels[reference]}"
    columns = [Column("arm"), *(Column(name, "validation loss at equal") for name in readers)]
    columns += [Column(name, against) for name in readers] * (len(arms) > 1) + [Column("seconds to loss")]
    rows, strong = [], set()
    for i, (label, arm) in enumerate(zip(labels, arms, strict=True)):
        row = [marked(label, arm)]
        row += [cell(arm, read, number(4)) + flags[i] * (name == "time") for name, read in readers.items()]
        for name in found if len(arms) > 1 else ():
            contrast = found[name].get(i)
            if contrast and contrast.decided:
                strong.add((i, len(row)))
            row.append(contrast.text + flags[i] * (name == "time") if contrast else DASH)
        rows.append([*row, cell(arm, seconds_to(target), number(2)) + flags[i]])
    lead = (
        "Read from the validation curve, linearly between two validations"
        f"{', over a sample of the text, so that it ends beside the final loss' * bool(sampled)}. What the run that "
        f"spent least had spent at its last validation: {budgets['steps']:,.0f} steps, {short_count(budgets['FLOPs'])}"
        f"FLOPs, {budgets['time']:.1f} s of training. The loss that all runs reach: {target:.4f}."
    )
    return Table(title, columns, rows, frozenset(strong), lead, ("loss_",))


def measure_table(
    title: str,
    measures: Sequence[Measure],
    comparison: Comparison,
    labels: Sequence[str],
    lead: str = "",
    figures: tuple[str, ...] = (),
) -> Table:
    """A row per arm and a column per measure; measures that no arm has are left out, and arms that have none."""
    grid = np.array([[cell(arm, measure.read, measure.form) for measure in measures] for arm in comparison.arms])
    used = [measure for measure, column in zip(measures, grid.T, strict=True) if set(column) != {DASH}]
    rows = [
        [marked(label, arm), *(cell(arm, measure.read, measure.form) for measure in used)]
        for label, arm, row in zip(labels, comparison.arms, grid, strict=True)
        if set(row) != {DASH}
    ]
    columns = [Column("arm"), *(Column(measure.heading, measure.group) for measure in used)]
    return Table(title, columns, rows, lead=lead, figures=figures)


TRAINING = {"train_group": "training, one routing group", "train_step": "training, one step"}
SIDES = (("demand", "Demand: what the router asked for"), ("load", "Load: what was computed, after drops"))


def balance_table(comparison: Comparison, labels: Sequence[str]) -> Table:
    """How evenly experts were asked and used: a row per arm and place of measurement."""
    columns = [Column("arm"), Column("measured over", words=True)]
    columns += [Column(name, heading) for _, heading in SIDES for name in ("max_vio", "load_cv")]
    columns += [Column("drop rate"), Column("loss")]
    rows = []
    for label, arm in zip(labels, comparison.arms, strict=True):
        modes = {f"{stage_of(arm, mode)}_pass": mode for mode in arm.modes}
        for prefix in (*TRAINING, *modes):
            mode, read = modes.get(prefix), last if prefix in modes else logged
            place = f"evaluation, {mode}" if len(modes) > 1 else "evaluation"
            row = [marked(label, arm, "any"), place + sign(arm, mode) if mode else TRAINING[prefix]]
            for side, _ in SIDES:
                row += [cell(arm, read(f"{prefix}/{what}/{side}/mean"), number(3)) for what in ("max_vio", "load_cv")]
            row.append(cell(arm, read(f"{prefix}/drop_rate/mean"), percent))
            loss = cell(arm, field("result", f"{stage_of(arm, mode)}/loss"), number(4)) if mode else DASH
            rows.append([*row, loss])
    return Table(
        "Balance: demand and load of each expert",
        columns,
        rows,
        lead=balance_sentence(comparison, labels),
        figures=("load_", "drops_"),
    )


def gap_table(comparison: Comparison, labels: Sequence[str]) -> Table:
    """A row per arm and way of routing in evaluation, for arms that have several."""
    columns = [Column("arm"), Column("evaluation", words=True)]
    columns += [Column(name) for name in ("tokens that differ", "loss", "max_vio")]
    rows = [
        [
            marked(label, arm, mode),
            mode + sign(arm, mode),
            cell(arm, last(f"{stage_of(arm, mode)}_pass/routing_gap/mean"), percent),
            cell(arm, field("result", f"{stage_of(arm, mode)}/loss"), number(4)),
            cell(arm, last(f"{stage_of(arm, mode)}_pass/max_vio/load/mean"), number(3)),
        ]
        for label, arm in zip(labels, comparison.arms, strict=True)
        for mode in (arm.modes if len(arm.modes) > 1 else [])
    ]
    return Table("What does balanced routing change?", columns, rows, lead=GAP_LEAD)


def alarm_table(comparison: Comparison, labels: Sequence[str]) -> Table:
    """Every alarm that a run raised while it trained."""
    rows = [
        [marked(label, arm), str(run.seed), *(str(alarm.get(key)) for key in ("name", "layer", "step", "sentence"))]
        for label, arm in zip(labels, comparison.arms, strict=True)
        for run in arm.runs
        for alarm in run.status.get("alarms") or []
        if isinstance(alarm, dict)
    ]
    columns = [Column("arm"), Column("seed"), Column("alarm", words=True), Column("layer", words=True)]
    return Table("What raised an alarm?", [*columns, Column("step"), Column("what happened", words=True)], rows)
