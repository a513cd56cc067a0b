"""The tables: rows of plain values, for CSV files and for the page.

A share is N(i, label)/N(label); ``even`` is k/E, what it would be if experts had no preference and equal loads.
"""

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from lightning_base.analysis.measure import LEAST, Findings, Labelled, LayerFindings
from lightning_base.analysis.tokens import printable_token
from lightning_base.metrics.specialization import attracted, coactivation, lift, specialization

Row = dict[str, object]
Name = Callable[[int], str]

# Tokens that each expert attracts: in the table of the page, and in the CSV file.
ON_PAGE, IN_FILE = 8, 25


def token_name(tokenizer: Tokenizer | None) -> Name:
    """From a token's id to text that can be seen; to the id in brackets where nobody has said what it stands for."""
    if tokenizer is None:
        return "<{}>".format
    return lambda token: printable_token(tokenizer, token)


def write_tables(folder: Path, findings: Findings, name: Name) -> list[str]:
    """Writes every table that has rows as a CSV file; gives the file names."""
    tables = {
        "summary": summary_rows(findings),
        "domains": domain_rows(findings),
        "vocabulary": vocabulary_rows(findings, name),
        "attracted": attracted_rows(findings, name),
        "coactivation": coactivation_rows(findings),
        "training": training_rows(findings),
    }
    written = []
    for stem, rows in tables.items():
        first = next(rows, None)
        if first is None:
            continue
        with open(folder / f"{stem}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(first))
            writer.writeheader()
            writer.writerow(plain(first))
            writer.writerows(plain(row) for row in rows)
        written.append(f"{stem}.csv")
    return written


def plain(row: Row) -> Row:
    """A row as written: what is not known stays empty."""
    return {key: "" if value is None or value != value else value for key, value in row.items()}


def summary_rows(findings: Findings) -> Iterator[Row]:
    """One row per layer."""
    for layer in findings.layers:
        row: Row = {
            "layer": layer.name,
            "step": findings.newest,
            "tokens": layer.choices.num_tokens,
            "experts": layer.choices.num_experts,
            "experts_per_token": layer.choices.asked / layer.choices.num_tokens,
            "even": layer.even_share,
            "dropped": layer.dropped,
        }
        for kind, found in kinds(layer).items():
            row[f"{kind}_concentration"] = found.concentration
            row[f"{kind}_concentration_by_chance"] = found.by_chance
            row[f"{kind}_information"] = found.information
            row[f"{kind}_information_by_chance"] = found.information_by_chance
        yield row


def kinds(layer: LayerFindings) -> dict[str, Labelled]:
    """The three kinds of label."""
    return {"domain": layer.domains, "token": layer.tokens, "preceding": layer.preceding}


def domain_rows(findings: Findings) -> Iterator[Row]:
    """One row per layer, domain and expert."""
    for layer in findings.layers:
        share_ED = specialization(layer.domains.counts, layer.domains.totals)
        for domain, domain_name in enumerate(findings.text.domains):
            for expert in range(layer.choices.num_experts):
                if layer.domains.totals[domain] > 0:
                    yield {
                        "layer": layer.name,
                        "domain": domain_name,
                        "tokens": int(layer.domains.totals[domain]),
                        "expert": expert,
                        "assignments": int(layer.domains.counts[expert, domain]),
                        "share": float(share_ED[expert, domain]),
                        "even": layer.even_share,
                    }


def vocabulary_rows(findings: Findings, name: Name) -> Iterator[Row]:
    """One row per layer and token that occurs, with the expert that takes most of its occurrences."""
    for layer in findings.layers:
        best_V, expert_V = layer.tokens.counts.max(0)
        for token in (layer.tokens.totals > 0).nonzero().squeeze(1).tolist():
            occurrences = int(layer.tokens.totals[token])
            yield {
                "layer": layer.name,
                "token_id": token,
                "token": name(token),
                "tokens": occurrences,
                "expert": int(expert_V[token]),
                "assignments": int(best_V[token]),
                "share": int(best_V[token]) / occurrences,
                "even": layer.even_share,
            }


def attracted_rows(findings: Findings, name: Name, most: int = IN_FILE) -> Iterator[Row]:
    """One row per layer, expert, kind and rank: the tokens, and the preceding tokens, that an expert attracts most."""
    for layer in findings.layers:
        for kind in ("token", "preceding"):
            found = kinds(layer)[kind]
            lift_EL = lift(found.counts, found.totals)
            for expert, tokens in enumerate(attracted(found.counts, found.totals, least=LEAST, most=most)):
                for rank, token in enumerate(tokens, start=1):
                    yield {
                        "layer": layer.name,
                        "expert": expert,
                        "kind": kind,
                        "rank": rank,
                        "token_id": token,
                        "token": name(token),
                        "tokens": int(found.totals[token]),
                        "assignments": int(found.counts[expert, token]),
                        "lift": float(lift_EL[expert, token]),
                    }


def coactivation_rows(findings: Findings) -> Iterator[Row]:
    """One row per layer and pair of experts, if any token has two."""
    for layer in findings.layers:
        if not layer.has_pairs:
            continue
        share_EE = coactivation(layer.choices)
        for i in range(layer.choices.num_experts):
            for j in range(layer.choices.num_experts):
                if i != j:
                    yield {
                        "layer": layer.name,
                        "expert": i,
                        "other": j,
                        "tokens": int(layer.pairs[i, i]),
                        "tokens_of_both": int(layer.pairs[i, j]),
                        "share": float(share_EE[i, j]),
                    }


def training_rows(findings: Findings) -> Iterator[Row]:
    """One row per layer and checkpoint."""
    for layer in findings.layers:
        for moment in layer.moments:
            yield {
                "layer": layer.name,
                "step": moment.step,
                "saturation": moment.saturation,
                "previous_step": moment.previous_step,
                "switch_fraction": moment.switch_fraction,
            }


def percent(value: float | None) -> str:
    """A share for readers.

    >>> percent(0.1234), percent(None)
    ('12.3 %', '–')
    """
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f} %"
