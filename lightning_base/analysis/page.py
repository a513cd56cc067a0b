"""One HTML page that needs nothing else: no network, no scripts."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined

from lightning_base.analysis.measure import LEAST, Findings, LayerFindings
from lightning_base.analysis.run import FinishedRun
from lightning_base.analysis.tables import ON_PAGE, Name, attracted_rows, percent, summary_rows
from lightning_base.analysis.words import lead, missing, sentences
from lightning_base.report.picture import Picture
from lightning_base.report.style import CSS

OWN_CSS = """
td.tokens { white-space: normal; min-width: 16rem; text-align: left; }
code { background: var(--band); border: 1px solid var(--line); border-radius: 4px; padding: 0 .25rem; font-size: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
td.tokens small { margin-right: .5rem; }
"""

BODY = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ run.name }}: what its experts do</title>
<style>{{ css }}</style>
</head>
<body>
<header>
<p class="kicker">lightning_base analysis</p>
<h1>{{ run.name }}</h1>
</header>
<main>
<div class="summary"><p class="lead">{{ lead }}</p>
<ul>{% for sentence in sentences %}<li>{{ sentence }}</li>{% endfor %}</ul></div>
{% for text in missing %}<p class="note">Not shown: {{ text }}</p>{% endfor %}
<h3>Layers</h3>
<div class="scroll" tabindex="0" role="region" aria-label="Layers"><table>
<thead>
<tr class="groups"><th></th><th></th><th></th><th colspan="2">by domain</th><th colspan="2">by token</th>\
<th colspan="2">by preceding token</th></tr>
<tr><th scope="col">layer</th><th scope="col">k/E</th><th scope="col">dropped</th>\
{% for _ in range(3) %}<th scope="col">favourite expert</th><th scope="col">by chance</th>{% endfor %}</tr>
</thead>
<tbody>{% for row in summary %}<tr><th scope="row">{{ row.layer }}</th><td>{{ percent(row.even) }}</td>\
<td>{{ percent(row.dropped) }}</td>{% for kind in ("domain", "token", "preceding") %}\
<td>{{ percent(row[kind ~ "_concentration"]) }}</td><td>{{ percent(row[kind ~ "_concentration_by_chance"]) }}</td>\
{% endfor %}</tr>{% endfor %}</tbody>
</table></div>
<p class="note">Favourite expert: how many tokens reach the expert that takes most of their domain, of their own kind,
or of what follows the same token; with one expert per token, how often a guess from that alone is right. By chance: the
same after giving the labels to random tokens. Labels of {{ least }} tokens or more. Loads are counted after drops.</p>
<h3>Figures</h3>
<div class="figures">
{% for picture in pictures %}
<figure{% if picture.width > 6 %} class="wide"{% endif %}>
<h4>{{ picture.title }}</h4>
<div class="scroll" tabindex="0" role="region" aria-label="{{ picture.title }}">\
<img style="max-width:{{ (picture.width * 6.5)|round(1) }}rem" alt="{{ picture.title }}: {{ picture.caption }}" \
src="data:image/svg+xml;base64,{{ encoded(picture.svg) }}"></div>
<figcaption>{{ picture.caption }} <small>{{ picture.name }}.png</small></figcaption>
</figure>
{% endfor %}
</div>
<h3>What each expert attracts</h3>
<p class="note">The tokens, and the tokens before them, that are most over-represented at each expert, of those that \
occur {{ least }} times or more; the number is how many times more frequent they are there than in the text. ␣ is a \
space, ↵ the end of a line, ⇥ a tab. attracted.csv has more of them, with counts.</p>
{% for layer in attraction %}
<h4>{{ layer.name }}</h4>
<div class="scroll" tabindex="0" role="region" aria-label="{{ layer.name }}"><table>
<thead><tr><th scope="col">expert</th><th scope="col">load</th><th scope="col" class="words">tokens</th>\
<th scope="col" class="words">preceding tokens</th></tr></thead>
<tbody>{% for expert in layer.experts %}<tr><th scope="row">{{ expert.number }}</th><td>{{ expert.load }}</td>\
{% for found in (expert.tokens, expert.preceding) %}<td class="tokens">\
{% for text, lift in found %}<code>{{ text }}</code> <small>{{ lift }}</small> {% else %}–{% endfor %}</td>\
{% endfor %}</tr>{% endfor %}</tbody>
</table></div>
{% endfor %}
<h3>Files</h3>
<p class="note">Beside this page: {{ files|join(", ") }}.</p>
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class ExpertRow:
    """One expert of the table: its share of the load, and what it attracts as (token, lift)."""

    number: int
    load: str
    tokens: list[tuple[str, str]]
    preceding: list[tuple[str, str]]


@dataclass(frozen=True)
class AttractionTable:
    """The table of one layer."""

    name: str
    experts: list[ExpertRow]


def html(run: FinishedRun, findings: Findings, pictures: Sequence[Picture], files: Sequence[str], name: Name) -> str:
    """The page; whatever comes from files is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(BODY).render(
        run=run,
        css=CSS + OWN_CSS,
        lead=lead(run, findings),
        sentences=sentences(findings),
        missing=missing(run, findings),
        summary=list(summary_rows(findings)),
        pictures=pictures,
        attraction=attraction(findings, name),
        files=files,
        percent=percent,
        least=LEAST,
        encoded=lambda content: base64.b64encode(content).decode(),
    )


def attraction(findings: Findings, name: Name) -> list[AttractionTable]:
    """The table of each layer."""
    rows = list(attracted_rows(findings, name, ON_PAGE))
    return [attraction_table(layer, [row for row in rows if row["layer"] == layer.name]) for layer in findings.layers]


def attraction_table(layer: LayerFindings, rows: Sequence[dict[str, object]]) -> AttractionTable:
    """One row per expert."""
    load = layer.choices.load
    total = max(1, int(load.sum()))

    def found(expert: int, kind: str) -> list[tuple[str, str]]:
        mine = [row for row in rows if row["expert"] == expert and row["kind"] == kind]
        return [(str(row["token"]), f"{row['lift']:.1f}×") for row in mine]

    experts = [
        ExpertRow(i, percent(int(count) / total), found(i, "token"), found(i, "preceding"))
        for i, count in enumerate(load)
    ]
    return AttractionTable(layer.name, experts)
