"""One table per question that a comparison of routers has to answer, besides quality, cost and balance."""

from collections.abc import Sequence

import numpy as np

from lightning_base.report.fairness import Arm, Comparison
from lightning_base.report.measures import DASH, Measure, Reader, cell, number, percent, result
from lightning_base.report.read import Run
from lightning_base.report.table import Column, Table, footnotes, marked, marked_in_mode, other_modes, usual_mode


def question_tables(comparison: Comparison, labels: Sequence[str]) -> list[Table]:
    """The tables that have anything to say about these arms, in the order of the report."""
    found = [
        gap_table(comparison, labels),
        measure_table("Does routing look ahead?", LEAK_LEAD, comparison, labels, LEAK),
        measure_table("Where does the time of a step go?", TIME_LEAD, comparison, labels, TIME),
        measure_table("Who would wait, and what would be padding?", COMPUTE_LEAD, comparison, labels, COMPUTE),
        alarm_table(comparison, labels),
    ]
    return [table for table in found if table.rows]


def measure_table(
    title: str, lead: str, comparison: Comparison, labels: Sequence[str], measures: Sequence[Measure]
) -> Table:
    """A row per arm and a column per measure; measures that no arm has are left out, and arms that have none."""
    rows = [[cell(arm, measure.read, measure.form) for measure in measures] for arm in comparison.arms]
    used = [j for j in range(len(measures)) if any(row[j] != DASH for row in rows)]
    columns = [Column(measures[j].heading, measures[j].group, measures[j].help) for j in used]
    kept = [
        [marked(label, arm), *(row[j] for j in used)]
        for label, arm, row in zip(labels, comparison.arms, rows, strict=True)
        if any(row[j] != DASH for j in used)
    ]
    return Table(title, [Column("arm"), *columns], kept, footnotes(kept), lead=lead)


def last(name: str) -> Reader:
    return lambda run: run.last(name)


def steady(name: str) -> Reader:
    """The mean over logged steps after the first, which holds the warm-up; of the first if there is no other."""

    def read(run: Run) -> float | None:
        series = run.series.get(name)
        return (
            None if series is None else float(np.mean(series.values[1:] if len(series.values) > 1 else series.values))
        )

    return read


LEAK_LEAD = (
    "In routing groups of validation text, everything in the second half was replaced by other text; the share of "
    "tokens in the first half whose expert, gate or drop changed. Worst layer; each layer's router by itself."
)
LEAK = [
    Measure(
        heading,
        f"routed as in {stage}",
        f"share of earlier tokens whose {what} changes when only later tokens change, routed as in {stage} "
        f"(final_causality/leak_{stage}_{way}/max)",
        result(f"final_causality/leak_{stage}_{way}/max"),
        percent,
    )
    for stage in ("training", "evaluation")
    for way, heading, what in (
        ("expert", "experts", "set of experts"),
        ("weight", "gates", "gate"),
        ("drop", "drops", "drop"),
        ("any", "any", "expert, gate or drop"),
    )
]

TIME_LEAD = (
    "Shares of an optimizer step, mean over the logged steps after the first and over processes. Router to combine are "
    "the sparse layers in the forward pass; waiting is for slower processes."
)
PHASES = {
    "router": "gates, choice of experts and losses, without the assignment",
    "assignment": "solving a balanced assignment (BASE), or approximating one (S-BASE, BIP)",
    "dispatch": "sorting tokens by expert",
    "experts": "the experts' networks, forward",
    "combine": "bringing outputs back, by weight",
    "other_forward": "attention, dense layers, embedding and loss",
    "waiting": "for the slowest process, before gradients are reduced",
    "backward_and_optimizer": "the rest of the step",
}
TIME = [
    Measure(
        phase.replace("_", " "),
        "share of a training step",
        f"{what} (train_time/share_{phase})",
        steady(f"train_time/share_{phase}"),
        percent,
    )
    for phase, what in PHASES.items()
]

COMPUTE_LEAD = (
    "Idle fraction: 1 - mean / max of the tokens computed, over processes as they ran and over experts as if each had "
    "a process of its own; 0 is even, 1 - 1/E is everything on one expert. Uniform and skewed routing are the two ends."
)
COMPUTE = [
    Measure(
        "idle, over processes",
        "training, one step",
        "1 - mean/max over processes of the tokens their experts compute (train_step/idle_fraction)",
        steady("train_step/idle_fraction/mean"),
        percent,
    ),
    Measure(
        "idle, over experts",
        "training, one step",
        "1 - mean/max over experts (train_step/idle_fraction_experts)",
        steady("train_step/idle_fraction_experts/mean"),
        percent,
    ),
    Measure(
        "batched padding",
        "training, one step",
        "share of padding if every expert got as many rows as the fullest one (train_micro_batch/batched_padding)",
        steady("train_micro_batch/batched_padding/mean"),
        percent,
    ),
    Measure(
        "empty slots",
        "training, one step",
        "share of empty slots in buffers of the experts' capacity (train_step/capacity_padding)",
        steady("train_step/capacity_padding/mean"),
        percent,
    ),
    Measure(
        "idle, over experts",
        "evaluation",
        "1 - mean/max over experts, over the whole validation text (final_pass/idle_fraction_experts)",
        last("final_pass/idle_fraction_experts/mean"),
        percent,
    ),
    Measure(
        "idle time, over processes",
        "measured",
        "1 - mean/max over processes of the seconds spent in experts (train_time/idle_fraction)",
        steady("train_time/idle_fraction"),
        percent,
    ),
]

GAP_LEAD = (
    "The same validation text routed in each of the router's ways: how many tokens change their experts, and the loss "
    "and the fullest expert in each. From the second sparse layer on, hidden states differ too."
)


def gap_table(comparison: Comparison, labels: Sequence[str]) -> Table:
    """A row per arm and way of routing in evaluation, for arms that have several."""
    columns = [
        Column("arm"),
        Column("evaluation", "", "how tokens were routed; the first is the one that counts", words=True),
        Column("tokens that differ", "", "share of tokens whose set of experts is another one, mean over layers"),
        Column("loss", "", "validation loss [nats per token] when routed this way"),
        Column("max_vio", "", "(max n - mean n) / mean n of the load over the whole text, mean over layers"),
    ]
    rows = []
    for label, arm in zip(labels, comparison.arms, strict=True):
        usual, others = usual_mode(arm), other_modes(arm)
        for mode in [usual, *others] if others else []:
            stage = "final" if mode == usual else f"final_{mode}"
            rows.append(
                [
                    *marked_in_mode(label, arm, mode, mode),
                    cell(arm, last(f"{stage}_pass/routing_gap/mean"), percent),
                    cell(arm, result(f"{stage}/loss"), number(4)),
                    cell(arm, last(f"{stage}_pass/max_vio/load/mean"), number(3)),
                ]
            )
    return Table("What does balanced routing change?", columns, rows, footnotes(rows), lead=GAP_LEAD)


def alarm_table(comparison: Comparison, labels: Sequence[str]) -> Table:
    """Every alarm that a run raised while it trained."""
    rows = [
        [
            marked(label, arm),
            str(alarm.get("name")),
            str(alarm.get("layer")),
            str(alarm.get("step")),
            sentence(arm, run, alarm),
        ]
        for label, arm in zip(labels, comparison.arms, strict=True)
        for run in arm.runs
        for alarm in run.status.get("alarms") or []
        if isinstance(alarm, dict)
    ]
    columns = [Column("arm"), Column("alarm", words=True), Column("layer", words=True), Column("step")]
    columns.append(Column("what happened", words=True))
    return Table("What raised an alarm?", columns, rows, footnotes(rows))


def sentence(arm: Arm, run: Run, alarm: dict[str, object]) -> str:
    """What happened, and in which seed if there are several."""
    text = str(alarm.get("sentence"))
    return text if len(arm.runs) == 1 else f"seed {run.seed}: {text}"
