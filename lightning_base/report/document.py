"""The report before it has a format: sections of sentences, tables and figures."""

from dataclasses import dataclass, replace
from pathlib import Path

from lightning_base.report.answer import answer, cautions, footnotes, listed
from lightning_base.report.fairness import BY_SEED, Comparison, compare, differences
from lightning_base.report.labels import comparison_titles, labelled, short
from lightning_base.report.read import LeftOut, ReportError
from lightning_base.report.tables import Table, tables
from lightning_base.report.verify import sound_runs
from lightning_base.report.words import WORDS


@dataclass(frozen=True)
class Section:
    """One comparison of labelled arms in words and tables; ``apart`` says why it is not part of the first one.

    The first of the ``tables`` is the short one; ``notes`` explain signs that no earlier section has.
    """

    title: str
    comparison: Comparison
    apart: list[str]
    tables: list[Table]
    notes: list[str]

    @property
    def labels(self) -> list[str]:
        return [arm.label for arm in self.comparison.arms]

    @property
    def answer(self) -> list[str]:
        return answer(self.comparison)

    @property
    def cautions(self) -> list[str]:
        return list(cautions(self.comparison))

    @property
    def made_with(self) -> dict[str, str]:
        return made_with(self.comparison)


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
    experiment = sound_runs(*directories)
    if not experiment.runs:
        states = [f"{job.label} is {job.state} ({job.reason})" for job in experiment.left_out]
        where = " and ".join(map(str, directories))
        raise ReportError(f"{where} holds no finished run that could be reported: {'; '.join(states)}")
    comparisons = [labelled(comparison) for comparison in compare(experiment.runs)]
    said: set[str] = set()

    def new(text: str) -> bool:
        """Whether a note, or the explanation of a heading, stands here for the first time."""
        known = text in said
        said.add(text)
        return not known

    sections = []
    for title, comparison in zip(comparison_titles(comparisons), comparisons, strict=True):
        explained = []
        for table in tables(comparison):
            words = [name for name in (column.heading for column in table.columns) if name in WORDS["headings"]]
            explained.append(replace(table, help=tuple((w, WORDS["headings"][w]) for w in words if new(w))))
        notes = [note for note in footnotes(comparison) if new(note)]
        sections.append(Section(title, comparison, apart(comparison, comparisons[0]), explained, notes))
    return Document(experiment.name, sections, experiment.left_out)


def apart(comparison: Comparison, first: Comparison) -> list[str]:
    """The fields in which a comparison is not the first one, with both values."""
    lines = []
    for field, *values in differences(comparison, first):
        here, there = map(short, values) if short(values[0]) != short(values[1]) else map(str, values)
        lines.append(f"{field}: {here} here, {there} in the first table")
    return lines


def made_with(comparison: Comparison) -> dict[str, str]:
    """What all arms of a table share, by name."""
    shared, manifests = comparison.setting, [arm.first.manifest for arm in comparison.arms]
    corpus = manifests[0].get("corpus") or {}
    steps, sequences = int(shared["steps"]), int(shared["sequences"])
    return {
        "seeds": listed([str(seed) for seed in comparison.seeds]),
        "steps": f"{steps:,} of {sequences // max(steps, 1):,} sequences",
        "tokens trained on": f"{int(shared['tokens']):,}",
        "corpus": short(shared["corpus_fingerprint"]),
        **{name.replace("_", " "): f"{corpus[name]:,}" for name in corpus if isinstance(corpus[name], int)},
        "unigram entropy": f"{corpus['unigram_entropy']:.4f} nats" if "unigram_entropy" in corpus else "–",
        **{name.removesuffix("_fingerprint").replace("_", " "): short(shared[name]) for name in BY_SEED},
        "commit": short(shared["git_commit"]),
        "device": listed(sorted({str(manifest["device"]) for manifest in manifests})),
        "processes": listed(sorted({str(manifest["world_size"]) for manifest in manifests})),
        "Python": str(shared["python"]),
        **{key.removeprefix("packages."): str(value) for key, value in shared.items() if key.startswith("packages.")},
    }
