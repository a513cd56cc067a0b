"""Tables as plain cells, before anyone decides between HTML, Markdown and a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_base.report.fairness import Arm, Comparison
from lightning_base.report.measures import (
    DASH,
    MEASURES,
    SUMMARY,
    Measure,
    Reader,
    cell,
    final_loss,
    mean,
    number,
    percent,
    result,
)
from lightning_base.report.read import Run

NOT_CAUSAL_IN_TRAINING, NOT_CAUSAL_IN_EVALUATION = "†", "‡"


@dataclass(frozen=True)
class Column:
    """``group`` stands above the headings of neighbours that share it; ``help`` how to read it."""

    heading: str
    group: str = ""
    help: str = ""
    words: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row is its heading. ``strong`` holds (row, column) of the best.

    ``lead`` says, above the table, what was measured.
    """

    title: str
    columns: list[Column]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    strong: frozenset[tuple[int, int]] = frozenset()
    lead: str = ""


def summary_table(comparison: Comparison, labels: Sequence[str]) -> Table:
    """The few numbers to look at first: one row per arm."""
    return arms_table("Summary", SUMMARY, comparison, labels)


def cost_table(comparison: Comparison, labels: Sequence[str]) -> Table:
    """All of quality, speed, cost and drops: one row per arm."""
    return arms_table("Quality and cost", MEASURES, comparison, labels)


def arms_table(title: str, measures: Sequence[Measure], comparison: Comparison, labels: Sequence[str]) -> Table:
    """A row per arm, a column per measure, of which the first is the validation loss."""
    arms = comparison.arms
    seeds = len(comparison.seeds) > 1
    columns = [Column("arm"), *([Column("n", "", "seeds trained")] if seeds else [])]
    columns += [Column(measure.heading, measure.group, measure.help) for measure in measures]
    rows = [
        [
            marked(label, arm),
            *([str(len(arm.runs))] if seeds else []),
            *(cell(arm, measure.read, measure.form) for measure in measures),
        ]
        for label, arm in zip(labels, arms, strict=True)
    ]
    # A loss that profits from later tokens is not the best one.
    losses = [mean(arm, final_loss) if causal_in(arm, usual_mode(arm)) else None for arm in arms]
    known = [loss for loss in losses if loss is not None]
    place = 2 if seeds else 1
    best = {(i, place) for i, loss in enumerate(losses) if known and loss == min(known) and len(arms) > 1}
    notes = footnotes(rows)
    if seeds:
        notes.append("Mean ± sample standard deviation over n seeds.")
    return Table(title, columns, rows, notes, frozenset(best))


def causal_in(arm: Arm, mode: str) -> bool:
    """Whether a way of routing in evaluation never looks at later tokens."""
    return bool(arm.first.ledger["evaluation_modes"][mode])


def marked(label: str, arm: Arm) -> str:
    """The label with the signs of its footnotes, as the arm is usually evaluated."""
    training = "" if arm.first.ledger["causal_in_training"] else NOT_CAUSAL_IN_TRAINING
    return label + training + ("" if causal_in(arm, usual_mode(arm)) else NOT_CAUSAL_IN_EVALUATION)


def marked_in_mode(label: str, arm: Arm, words: str, mode: str | None) -> list[str]:
    """Two cells, for tables with a row per way of routing: the arm, and ``words`` for how it routed there.

    ``mode`` is None in training.
    """
    training = "" if arm.first.ledger["causal_in_training"] else NOT_CAUSAL_IN_TRAINING
    causal = mode is None or causal_in(arm, mode)
    return [label + training, words + ("" if causal else NOT_CAUSAL_IN_EVALUATION)]


def footnotes(rows: Sequence[Sequence[str]]) -> list[str]:
    """What the signs in the rows of a table mean; only those that occur."""
    training = any(NOT_CAUSAL_IN_TRAINING in cell for row in rows for cell in row[:2])
    evaluation = any(NOT_CAUSAL_IN_EVALUATION in cell for row in rows for cell in row[:2])
    notes = []
    if training:
        notes.append(
            f"{NOT_CAUSAL_IN_TRAINING} Not causal in training: there, a token's expert may depend on later tokens of "
            "its routing group, so its training loss does not compare. Its validation loss here is measured with "
            f"causal routing{f', unless marked {NOT_CAUSAL_IN_EVALUATION}' if evaluation else ''}."
        )
    if evaluation:
        notes.append(
            f"{NOT_CAUSAL_IN_EVALUATION} Not causal in evaluation: tokens are routed with a view of later ones, so "
            "that a validation loss there is no loss of a language model."
        )
    return notes


@dataclass(frozen=True)
class Scope:
    """Where balance is measured: the prefix of its scalars, and the way of routing in evaluation; None in training,
    over which scalars are averaged.
    """

    name: str
    prefix: str
    mode: str | None = None

    @property
    def training(self) -> bool:
        return self.mode is None


TRAINING = (Scope("training, one routing group", "train_group"), Scope("training, one step", "train_step"))
SIDES = (("demand", "Demand: what the router asked for"), ("load", "Load: what was computed, after drops"))


def balance_table(comparison: Comparison, labels: Sequence[str]) -> Table:
    """How evenly experts were asked and used: a row per arm and place of measurement."""
    columns = [Column("arm"), Column("measured over", "", SCOPE_HELP, words=True)]
    columns += [Column(name, heading, BALANCE_HELP[name]) for _, heading in SIDES for name in BALANCE_HELP]
    columns += [
        Column(
            "drop rate",
            "",
            "dropped / assignments asked for (T k, or fewer where tokens may ask for fewer), mean over layers",
        ),
        Column("loss", "", LOSS_HELP),
    ]
    rows = []
    for label, arm in zip(labels, comparison.arms, strict=True):
        for scope in scopes(arm):
            sides = [balance(scope, name, side) for side, _ in SIDES for name in BALANCE_HELP]
            stage = scope.prefix.removesuffix("_pass")
            rows.append(
                [
                    *marked_in_mode(label, arm, scope.name, scope.mode),
                    *(cell(arm, read, number(3)) for read in sides),
                    cell(arm, scalar(scope, f"{scope.prefix}/drop_rate/mean"), percent),
                    DASH if scope.training else cell(arm, result(f"{stage}/loss"), number(4)),
                ]
            )
    return Table("Balance", columns, rows, footnotes(rows))


SCOPE_HELP = (
    "training: mean over the logged steps, measured inside single routing groups (train_group) or over a whole "
    "optimizer step of all processes (train_step); evaluation: over the whole validation text after the last step "
    "(final_pass), and again for every other way the router can route there"
)
BALANCE_HELP = {
    "max_vio": "(max n - mean n) / mean n over the counts n of the experts, mean over layers; 0 is exactly even, E - 1 "
    "is everything on one expert (loss-free balancing, arXiv 2408.15664, eq. 4)",
    "load_cv": "population standard deviation of n / mean n, mean over layers (Shazeer et al. 2017)",
}
LOSS_HELP = "validation loss [nats per token] when routed this way"


def scopes(arm: Arm) -> list[Scope]:
    """Training, the evaluation that counts, and every other evaluation mode that was measured."""
    modes, usual = other_modes(arm), usual_mode(arm)
    others = [Scope(f"evaluation, {mode}", f"final_{mode}_pass", mode) for mode in modes]
    return [*TRAINING, Scope(f"evaluation, {usual}" if modes else "evaluation", "final_pass", usual), *others]


def usual_mode(arm: Arm) -> str:
    """The way of routing in evaluation that counts."""
    return str(next(iter(arm.first.ledger["evaluation_modes"])))


def other_modes(arm: Arm) -> list[str]:
    """Every other way in which the validation text was routed."""
    return [mode for mode in arm.first.ledger["evaluation_modes"] if mode != usual_mode(arm)]


def balance(scope: Scope, name: str, side: str) -> Reader:
    return scalar(scope, f"{scope.prefix}/{name}/{side}/mean")


def scalar(scope: Scope, name: str) -> Reader:
    def read(run: Run) -> float | None:
        return run.mean(name) if scope.training else run.last(name)

    return read
