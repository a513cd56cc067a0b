"""The report before it has a format: sections of sentences, tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_base.report.answer import answer, cautions
from lightning_base.report.formats import WORDS, Picture, Table
from lightning_base.report.labels import apart, comparison_titles, labelled, listed, packages, short
from lightning_base.report.tables import footnotes, tables
from lightning_base.results.fairness import BY_SEED, Comparison, compare
from lightning_base.results.read import LeftOut, ReportError
from lightning_base.results.verify import sound_runs


@dataclass(frozen=True)
class Section:
    """One comparison of labelled arms in words and tables; ``apart`` says why it is not part of the first one.

    The first of the ``tables`` is the short one; ``notes`` explain signs that no earlier section has. The names of its
    files begin with ``prefix``. Figures are drawn last.
    """

    title: str
    comparison: Comparison
    apart: list[str]
    answer: list[str]
    cautions: list[str]
    tables: list[Table]
    notes: list[str]
    made_with: dict[str, str]
    prefix: str
    pictures: Sequence[Picture] = ()

    @property
    def labels(self) -> list[str]:
        return [arm.label for arm in self.comparison.arms]


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
    runs, left_out = sound_runs(*directories)
    if not runs:
        states = [f"{job.label} is {job.state} ({job.reason})" for job in left_out]
        where = " and ".join(map(str, directories))
        raise ReportError(f"{where} holds no finished run that could be reported: {'; '.join(states)}")
    comparisons = [labelled(comparison) for comparison in compare(runs)]
    said: set[str] = set()

    def new(text: str) -> bool:
        """Whether a note, or the explanation of a heading, stands here for the first time."""
        known = text in said
        said.add(text)
        return not known

    def explained(table: Table) -> Table:
        texts = ((column.heading, WORDS["headings"].get(column.heading, "")) for column in table.columns)
        return replace(table, help=tuple((name, text) for name, text in texts if text and new(name)))

    sections = [
        Section(
            title,
            comparison,
            apart=list(apart(comparison, comparisons[0])),
            answer=list(answer(comparison)),
            cautions=cautions(comparison),
            tables=(shown := list(map(explained, tables(comparison)))),
            notes=list(filter(new, footnotes(shown))),
            made_with=made_with(comparison),
            prefix=f"{i}_" if len(comparisons) > 1 else "",
        )
        for i, (title, comparison) in enumerate(zip(comparison_titles(comparisons), comparisons, strict=True), 1)
    ]
    return Document(" + ".join(directory.resolve().name for directory in directories), sections, left_out)


def made_with(comparison: Comparison) -> dict[str, str]:
    """What all arms of a table share, by name."""
    shared, manifests = comparison.setting, [arm.first.manifest for arm in comparison.arms]
    corpus = manifests[0].get("corpus") or {}
    code = sorted({text for arm in comparison.arms for run in arm.runs for text in packages(run)})
    return {
        "seeds": listed(list(map(str, comparison.seeds))),
        "steps": f"{shared['steps']:,} of {shared['sequences'] // max(shared['steps'], 1):,} sequences",
        "tokens trained on": f"{shared['tokens']:,}",
        "corpus": short(shared["corpus_fingerprint"]),
        **{name.replace("_", " "): f"{corpus[name]:,}" for name in corpus if isinstance(corpus[name], int)},
        "unigram entropy": f"{corpus['unigram_entropy']:.4f} nats" if "unigram_entropy" in corpus else "–",
        **{name.removesuffix("_fingerprint").replace("_", " "): short(shared[name]) for name in BY_SEED},
        "commit": listed(sorted({short(manifest.get("git_commit")) for manifest in manifests})),
        **({"code": listed(code)} if code else {}),
        "device": listed(sorted({manifest["device"] for manifest in manifests})),
        "processes": listed(sorted({str(manifest["world_size"]) for manifest in manifests})),
        "Python": str(shared.get("python")),
        **{key.removeprefix("packages."): str(value) for key, value in shared.items() if key.startswith("packages.")},
    }
