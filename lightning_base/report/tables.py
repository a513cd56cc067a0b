"""Tables as plain cells, before anyone decides between HTML, Markdown, LaTeX, CSV and a terminal."""

import math
from collections.abc import Sequence
from functools import partial

from lightning_base.report import answer, measures
from lightning_base.report.formats import WORDS, Strong, Table
from lightning_base.report.measures import DASH, FOUR, THREE, TWO, Column, cell, machine_noise, number, percent
from lightning_base.results.fairness import Arm, Comparison, stage_of, unequal
from lightning_base.results.statistics import Interval, interval

ARM = Column("arm")


def by_column(title: str, cells: dict[Column, list[str]], lead: str = "", figures: tuple[str, ...] = ()) -> Table:
    """A table from its columns; those without a word in any cell are left out."""
    kept = {column: found for column, found in cells.items() if any(found)}
    return Table(title, list(kept), [list(row) for row in zip(*kept.values(), strict=True)], lead, figures)


def tables(comparison: Comparison) -> list[Table]:
    """The short table, and after it those that fold; tables that have nothing to say about these arms are left out."""
    arms, leads = comparison.arms, WORDS["leads"]
    found = [
        short_table(comparison),
        contrast_table(comparison),
        equal_cost_table(comparison),
        measure_table("Quality, speed and cost; loss against speed", measures.FULL, arms, figures=("pareto",)),
        balance_table(comparison),
        measure_table("Who would wait, and what would be padding?", measures.COMPUTE, arms, leads["compute"]),
        gap_table(arms),
        measure_table("Does routing look ahead?", measures.LEAK, arms, leads["leak"]),
        measure_table("Where does the time of a step go?", measures.TIME, arms, leads["time"], ("step_time",)),
        measure_table("What does sending tokens cost?", measures.COMMUNICATION, arms, leads["communication"]),
        alarm_table(arms),
    ]
    return [table for table in found if table.rows]


def marked(arm: Arm, mode: str | None = None) -> str:
    """The label with the signs of its footnotes; with a ``mode``, the sign for evaluation stands beside that."""
    training = answer.NOT_CAUSAL_IN_TRAINING * (not arm.first.ledger["causal_in_training"])
    evaluation = answer.NOT_CAUSAL_IN_EVALUATION * (not arm.causal and not mode)
    return arm.label + training + evaluation + answer.OTHER_GRADIENT * arm.first.ledger.get("straight_through", False)


def ahead(arm: Arm, mode: str) -> str:
    return answer.NOT_CAUSAL_IN_EVALUATION * (not arm.modes[mode])


def difference(gap: Interval | None, flag: str = "") -> str:
    text = measures.paired(gap) + flag if gap else DASH
    return Strong(text) if gap and gap.decided and not flag else text


def short_table(comparison: Comparison) -> Table:
    """The few numbers to look at first: one row per arm."""
    arms, seeds, noise = comparison.arms, len(comparison.seeds), machine_noise(comparison.arms)
    reference = comparison.reference
    gaps, against = answer.contrasts(reference, arms), f"against {reference.label}"
    losses = [[x for x in measures.by_seed(arm, measures.final_loss).values() if math.isfinite(x)] for arm in arms]
    cells = {
        ARM: [marked(arm) + answer.OTHER_COST * unequal((arm, reference), "flops_per_token") for arm in arms],
        Column("seeds"): [f"{len(arm.runs)}" + f" of {seeds}" * (len(arm.runs) < seeds) for arm in arms],
        Column("validation loss"): list(map(measures.LOSS.cell, arms)),
        Column("difference", against): [difference(gaps.get(arm)) for arm in arms],
        Column("p", against): [f"{gaps[arm].p:.3f}" if arm in gaps and gaps[arm].known else DASH for arm in arms],
        Column("between seeds"): [f"{interval(some).spread:.4f}" if len(some) > 1 else DASH for some in losses],
        Column("bits per byte"): list(map(measures.BITS.cell, arms)),
        Column("tokens/s"): [speed_cell(arm) + sign for arm, sign in answer.not_quiet(arms).items()],
        Column("scaled tokens/s"): [f"{noise[a].scaled:,.0f}" if a in noise and noise[a].scaled else "" for a in arms],
        **{column: list(map(column.cell, arms)) for column in measures.ROUTED},
    }
    hidden = ["difference"] * (len(arms) == 1) + ["seeds", "p", "between seeds"] * (seeds == 1)
    return by_column("The arms", {c: v for c, v in cells.items() if c.heading not in hidden}, figures=("difference",))


def footnotes(found: Sequence[Table]) -> list[str]:
    """What the signs in some tables mean; only those that occur."""
    cells = "".join(text for table in found for row in table.rows for text in row)
    unless = f", unless marked {answer.NOT_CAUSAL_IN_EVALUATION}" * (answer.NOT_CAUSAL_IN_EVALUATION in cells)
    return [text.format(unless=unless) for sign, text in WORDS["notes"].items() if sign in cells]


def speed_cell(arm: Arm) -> str:
    """The median of all windows of all seeds, with quartiles where they are apart."""
    low, middle, high = [f"{pace:,.0f}" for pace in measures.quartiles(arm.runs)] or [DASH] * 3
    return middle if low == high else f"{middle} ({low} to {high})"


def contrast_table(comparison: Comparison) -> Table:
    """Every paired difference with both of its intervals; nothing for one seed."""
    rows = []
    held = [(other, *each) for other, gaps in answer.all_contrasts(comparison).items() for each in gaps.items()]
    for other, arm, gap in held:
        if gap.known:
            intervals = [" to ".join(map(measures.signed, ends)) for ends in ((gap.low, gap.high), gap.bootstrap())]
            better = f"{sum(value < 0 for value in gap.values)} of {len(gap.values)}"
            rows.append([marked(arm), other.label, difference(gap), *intervals, f"{gap.p:.4f}", better])
    columns = [ARM, Column("held against", words=True)]
    columns += map(Column, ("difference", "t interval", "bootstrap", "p", "better in"))
    return Table("Paired differences: t and bootstrap intervals", columns, rows, WORDS["leads"]["contrasts"])


def equal_cost_table(comparison: Comparison) -> Table:
    """The validation loss after equal steps, FLOPs and time, and the time to a loss that all reach."""
    title, arms = "Quality at equal steps, FLOPs and time; learning curves", comparison.arms
    runs, ranked = measures.validated(arms), measures.validated([a for a in arms if a.causal] or arms)
    if not ranked:
        return Table(title, [], [])
    # What the run that spent least had spent at its last validation; the lowest loss that every run has reached.
    budgets = {name: min(float(measures.cost(run, name)[-1]) for run in runs) for name in measures.COSTS}
    target = max(run.values(measures.CURVE)[-1] for run in ranked)
    signs = answer.not_quiet(arms)
    losses, gaps = {}, {}
    for name, spent in budgets.items():
        read = partial(measures.loss_at, name=name, spent=spent)
        sign = signs if name == "time" else dict.fromkeys(arms, "")
        found = answer.contrasts(comparison.reference, arms, read)
        losses[Column(name, "validation loss at equal")] = [cell(arm, read, FOUR) + sign[arm] for arm in arms]
        if len(arms) > 1:
            against = f"difference to {comparison.reference.label}"
            gaps[Column(name, against)] = [difference(found.get(arm), sign[arm]) for arm in arms]
    reach = partial(measures.seconds_to, loss=target)
    seconds = {Column("seconds to loss"): [cell(arm, reach, TWO) + signs[arm] for arm in arms]}
    cells = {ARM: list(map(marked, arms)), **losses, **gaps, **seconds}
    part = arms[0].first.fields.get("data.validation_sequences")
    sampled = ", over a sample of the text, so that it ends beside the final loss" if part else ""
    said = {**budgets, "FLOPs": measures.short_count(budgets["FLOPs"]), "sampled": sampled, "target": target}
    return by_column(title, cells, WORDS["leads"]["equal_cost"].format(**said), ("loss_",))


def measure_table(
    title: str, shown: Sequence[Column], arms: Sequence[Arm], lead: str = "", figures: tuple[str, ...] = ()
) -> Table:
    """A row per arm and a column of numbers; columns that no arm has are left out, and arms that have none."""
    having = [arm for arm in arms if any(column.cell(arm) != DASH for column in shown)]
    cells = {column: list(map(column.cell, having)) for column in shown}
    measured = {column: found for column, found in cells.items() if set(found) != {DASH}}
    return by_column(title, {ARM: list(map(marked, having)), **measured}, lead, figures)


TRAINING = {"train_group": "training, one routing group", "train_step": "training, one step"}
SIDES = {"demand": "Demand: what the router asked for", "load": "Load: what was computed, after drops"}


def balance_table(comparison: Comparison) -> Table:
    """How evenly experts were asked and used: a row per arm and place of measurement."""
    columns = [ARM, Column("measured over", words=True)]
    columns += [Column(name, heading) for heading in SIDES.values() for name in ("max_vio", "load_cv")]
    rows = []
    for arm in comparison.arms:
        several = len(arm.modes) > 1
        ways = {stage_of(arm, mode): f", {mode}" * several + ahead(arm, mode) for mode in arm.modes}
        for prefix, place in (TRAINING | {f"{stage}_pass": f"evaluation{way}" for stage, way in ways.items()}).items():
            names = [f"{prefix}/{what}/{side}/mean" for side in SIDES for what in ("max_vio", "load_cv")]
            row = [marked(arm, "any"), place, *(cell(arm, number(name), THREE) for name in names)]
            row.append(cell(arm, number(f"{prefix}/drop_rate/mean"), percent))
            rows.append([*row, cell(arm, number(f"result.{prefix.removesuffix('_pass')}/loss"), FOUR)])
    columns += [Column("drop rate"), Column("loss")]
    lead, title = answer.balance_sentence(comparison), "Balance: demand and load of each expert"
    return Table(title, columns, rows, lead, ("load_", "drops_"))


def gap_table(arms: Sequence[Arm]) -> Table:
    """A row per arm and way of routing in evaluation, for arms that have several."""
    columns = [ARM, Column("evaluation", words=True)]
    columns += [Column(name) for name in ("tokens that differ", "loss", "max_vio")]
    rows = []
    for arm, mode in [(each, mode) for each in arms for mode in each.modes if len(each.modes) > 1]:
        stage = stage_of(arm, mode)
        differ = cell(arm, number(f"{stage}_pass/routing_gap/mean"), percent)
        vio = cell(arm, number(f"{stage}_pass/max_vio/load/mean"), THREE)
        loss = cell(arm, number(f"result.{stage}/loss"), FOUR)
        rows.append([marked(arm, mode), mode + ahead(arm, mode), differ, loss, vio])
    return Table("What does balanced routing change?", columns, rows, WORDS["leads"]["gap"])


def alarm_table(arms: Sequence[Arm]) -> Table:
    """Every alarm that a run raised while it trained."""
    rows = [
        [marked(arm), str(run.seed), *(str(alarm.get(key)) for key in ("name", "layer", "step", "sentence"))]
        for arm in arms
        for run in arm.runs
        for alarm in run.status.get("alarms") or []
        if isinstance(alarm, dict)
    ]
    columns = [ARM, Column("seed"), Column("alarm", words=True), Column("layer", words=True)]
    return Table("What raised an alarm?", [*columns, Column("step"), Column("what happened", words=True)], rows)


def numbers_table(arms: Sequence[Arm]) -> Table:
    """Every number of every run unrounded, a row each: for who wants to compute with them."""
    columns = [ARM, *(Column(name) for name in ("seed", "group", "measure", "value"))]
    found = [(arm, run, measure, measure.read(run)) for arm in arms for run in arm.runs for measure in measures.ALL]
    rows = [[arm.label, str(run.seed), m.group, m.heading, repr(v)] for arm, run, m, v in found if v is not None]
    return Table("Numbers", columns, rows)
