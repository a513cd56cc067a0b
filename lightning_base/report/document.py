"""The report before it has a format: sections of sentences, tables and figures."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from lightning_base.report.answer import answer, cautions, listed
from lightning_base.report.fairness import BY_SEED, Arm, Comparison, compare, differences
from lightning_base.report.labels import arm_labels, comparison_titles, short
from lightning_base.report.marks import footnotes
from lightning_base.report.read import Experiment, LeftOut, ReportError, Run, read_experiment
from lightning_base.report.table import Table, tables
from lightning_base.report.verify import problems
from lightning_base.report.words import WORDS


@dataclass(frozen=True)
class Section:
    """One comparison: ``answer`` in a sentence or two, ``apart`` in words why it is not part of the first one.

    The first of the ``tables`` is the short one; ``notes`` explain signs that no earlier section has; ``details`` are
    what every run says of itself: its label, its directory, and texts with their headings.
    """

    title: str
    comparison: Comparison
    labels: list[str]
    answer: list[str]
    cautions: list[str]
    apart: list[str]
    tables: list[Table]
    notes: list[str]
    details: list[tuple[str, str, dict[str, str]]]
    made_with: list[tuple[str, str]]


@dataclass(frozen=True)
class Document:
    """The whole report: a section per comparison, and the jobs that are in none."""

    title: str
    sections: list[Section]
    left_out: list[LeftOut]


def build(*directories: Path) -> Document:
    """Reads, verifies, groups and words the runs of some directories.

    Raises:
        ReportError: a directory is not there, or no run in it is finished and sound.
    """
    experiment = verified(read_experiment(*directories))
    if not experiment.runs:
        states = [f"{job.label} is {job.state} ({job.reason})" for job in experiment.left_out]
        where = " and ".join(map(str, directories))
        raise ReportError(f"{where} holds no finished run that could be reported: {'; '.join(states)}")
    comparisons = compare(experiment.runs)
    titles = comparison_titles(comparisons)
    sections = [
        section(comparison, title, comparisons[0]) for comparison, title in zip(comparisons, titles, strict=True)
    ]
    return Document(experiment.name, said_once(sections), experiment.left_out)


def said_once(sections: list[Section]) -> list[Section]:
    """Every note and every explanation of a heading only where it first stands."""
    seen: set[str] = set()

    def new(text: str) -> bool:
        known = text in seen
        seen.add(text)
        return not known

    found = []
    for part in sections:
        explained = [
            replace(
                table,
                help=tuple(
                    (c.heading, WORDS[c.heading]) for c in table.columns if c.heading in WORDS and new(c.heading)
                ),
            )
            for table in part.tables
        ]
        found.append(replace(part, tables=explained, notes=[note for note in part.notes if new(note)]))
    return found


def verified(experiment: Experiment) -> Experiment:
    """Moves runs whose files contradict each other to those that are left out."""
    sound: list[Run] = []
    left_out = list(experiment.left_out)
    for run in experiment.runs:
        try:
            found = problems(run)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            found = [f"its files are not of the form a run writes ({type(error).__name__}: {error})"]
        if found:
            left_out.append(LeftOut(run.name, run.label, "refused", "; ".join(found)))
        else:
            sound.append(run)
    return Experiment(experiment.name, sound, left_out)


def section(comparison: Comparison, title: str, first: Comparison) -> Section:
    """A comparison in words and tables; ``first`` is the one it is held against."""
    labels = arm_labels(comparison.arms)
    apart = []
    if comparison is not first:
        for difference in differences(comparison, first):
            here, there = short(difference.here), short(difference.there)
            if here == there:
                here, there = str(difference.here), str(difference.there)
            apart.append(f"{difference.field}: {here} here, {there} in the first table")
    return Section(
        title=title,
        comparison=comparison,
        labels=labels,
        answer=answer(comparison, labels),
        cautions=list(cautions(comparison, labels)),
        apart=apart,
        tables=tables(comparison, labels),
        notes=list(footnotes(comparison)),
        details=[
            details(label, run, arm) for label, arm in zip(labels, comparison.arms, strict=True) for run in arm.runs
        ],
        made_with=made_with(comparison),
    )


def details(label: str, run: Run, arm: Arm) -> tuple[str, str, dict[str, str]]:
    """What a reader needs to check one run or to make it again."""
    certificate = {key: value for key, value in run.manifest.items() if key not in ("config", "ledger", "result")}
    overrides = " ".join(f"'{part}'" if set(part) & set(" {}[]()*$'\"") else part for part in run.overrides)
    texts = {
        "Started with": f"python experiments/train.py {overrides}".rstrip(),
        "Ledger: what it spent": json.dumps(run.ledger, indent=2),
        "Certificate: what it was": json.dumps(certificate, indent=2),
        "Configuration": yaml.safe_dump(run.config, sort_keys=False),
    }
    return f"{label}, seed {run.seed}" if len(arm.runs) > 1 else label, f"{run.path.parent.name}/{run.name}", texts


def made_with(comparison: Comparison) -> list[tuple[str, str]]:
    """What all arms of a table share, as names and values."""
    shared, arms = comparison.setting, comparison.arms
    corpus = arms[0].first.manifest.get("corpus") or {}
    steps, sequences = int(shared["steps"]), int(shared["sequences"])
    return [
        ("seeds", listed([str(seed) for seed in comparison.seeds])),
        ("steps", f"{steps:,} of {sequences // max(steps, 1):,} sequences"),
        ("tokens trained on", f"{int(shared['tokens']):,}"),
        ("corpus", short(shared["corpus_fingerprint"])),
        *((name.replace("_", " "), f"{corpus[name]:,}") for name in corpus if isinstance(corpus[name], int)),
        ("unigram entropy", f"{corpus['unigram_entropy']:.4f} nats" if "unigram_entropy" in corpus else "–"),
        *((name.removesuffix("_fingerprint").replace("_", " "), short(shared[name])) for name in BY_SEED),
        ("commit", short(shared["git_commit"])),
        *(
            (name, listed(sorted({str(arm.first.manifest[key]) for arm in arms})))
            for name, key in (("device", "device"), ("processes", "world_size"))
        ),
        ("Python", str(shared["python"])),
        *((key.removeprefix("packages."), str(value)) for key, value in shared.items() if key.startswith("packages.")),
    ]
