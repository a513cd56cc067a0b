"""The report as one HTML page that needs nothing else: no network, no scripts."""

import base64
import itertools
from collections.abc import Sequence

from jinja2 import Environment, StrictUndefined

from lightning_base.report.document import Document
from lightning_base.report.picture import Picture, claimed
from lightning_base.report.style import CSS
from lightning_base.report.table import Table
from lightning_base.report.words import WORDS

BODY = """\
{% macro scroll(title) %}<div class="scroll" tabindex="0" role="region" aria-label="{{ title }}">{{ caller() }}</div>
{% endmacro %}
{% macro shown(table, cautions, notes) %}
{% if table.lead %}<p class="note">{{ table.lead }}</p>{% endif %}
{% call scroll(table.title) %}<table>
<thead>
<tr class="groups">{% for group, size in groups(table) %}<th colspan="{{ size }}" scope="colgroup">{{ group }}</th>\
{% endfor %}</tr>
<tr>{% for column in table.columns %}<th scope="col" title="{{ words.get(column.heading, "") }}"\
{% if column.words %} class="words"{% endif %}>{{ column.heading }}</th>{% endfor %}</tr>
</thead>
<tbody>
{% for row in table.rows %}
<tr{% if table.columns[1].words and row[0] != table.rows[loop.index0 - 1][0] %} class="next"{% endif %}>\
<th scope="row">{{ row[0] }}</th>{% set line = loop.index0 %}\
{% for text in row[1:] %}<td{% if (line, loop.index) in table.strong %} class="best"\
{% elif table.columns[loop.index].words %} class="words"{% endif %}>\
{{ text if table.columns[loop.index].words else glued(text) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>{% endcall %}
{% if cautions %}<div class="caution">{% for text in cautions %}<p>{{ text }}</p>{% endfor %}</div>{% endif %}
{% for note in notes %}<p class="note">{{ note }}</p>{% endfor %}
{% if table.help %}<dl class="help">{% for name, text in table.help %}<div><dt>{{ name }}</dt> <dd>{{ text }}</dd></div>
{% endfor %}</dl>{% endif %}
{% endmacro %}
{% macro drawn(picture) %}
<figure{% if "load" in picture.name %} class="wide"{% endif %}>
<h3>{{ picture.title }}</h3>
{% call scroll(picture.title) %}<img style="max-width:{{ (picture.width * 6.5)|round(1) }}rem" \
alt="{{ picture.title }}: {{ picture.caption }}" src="data:image/svg+xml;base64,{{ encoded(picture.svg) }}">\
{% endcall %}
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ document.title }}: routing comparison</title>
<style>{{ css }}</style>
</head>
<body>
<header>
<p class="kicker">lightning_base report</p>
<h1>{{ document.title }}</h1>
</header>
<main>
{% for section, pictures in sections %}
<section class="comparison">
{% if sections|length > 1 %}<h2>{{ section.title }}</h2>{% endif %}
{% if section.apart %}
<aside class="apart"><p>Not comparable with the first table. Here differ:</p>
<ul>{% for line in section.apart %}<li>{{ line }}</li>{% endfor %}</ul></aside>
{% endif %}
<div class="summary">{% for sentence in section.answer %}<p class="lead">{{ sentence }}</p>{% endfor %}</div>
{% for picture in claimed(section.tables[0].figures, pictures) %}{{ drawn(picture) }}{% endfor %}
{{ shown(section.tables[0], section.cautions, section.notes) }}
{% for table in section.tables[1:] %}
<details><summary>{{ table.title }}</summary>
{{ shown(table, [], []) }}
<div class="figures">{% for picture in claimed(table.figures, pictures) %}{{ drawn(picture) }}{% endfor %}</div>
</details>
{% endfor %}
<details><summary>What the arms share: seeds, data, initial weights, code, machine</summary>
<dl class="facts">{% for name, value in section.made_with %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>\
{% endfor %}</dl></details>
<details><summary>Each run: how it was started, ledger, certificate, configuration</summary>
{% for label, directory, texts in section.details %}
<details><summary>{{ label }} <small>{{ directory }}</small></summary>
{% for heading, text in texts.items() %}<h4>{{ heading }}</h4><pre>{{ text }}</pre>{% endfor %}
</details>
{% endfor %}
</details>
</section>
{% endfor %}
{% if document.left_out %}
<section><h2>Not in any table</h2>
<ul class="leftout">{% for job in document.left_out %}
<li><strong>{{ job.label }}</strong> <span class="state">{{ job.state }}</span> {{ job.reason }}
{% if job.details %}<details><summary>traceback</summary><pre>{{ job.details }}</pre></details>{% endif %}</li>
{% endfor %}</ul></section>
{% endif %}
</main>
</body>
</html>
"""


def html(document: Document, pictures: Sequence[Sequence[Picture]]) -> str:
    """The page; whatever comes from files is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.globals.update(words=WORDS, claimed=claimed, groups=heading_groups)
    # Cells break before an interval only: a column is then as narrow as its mean.
    environment.globals["glued"] = lambda text: (
        text.replace(" ", "\u00a0").replace("\u00a0±", " ±").replace("\u00a0(", " (")
    )
    environment.globals["encoded"] = lambda content: base64.b64encode(content).decode()
    sections = list(zip(document.sections, pictures, strict=True))
    return environment.from_string(BODY).render(document=document, sections=sections, css=CSS).lstrip()


def heading_groups(table: Table) -> list[tuple[str, int]]:
    """The headings above the headings, with the number of columns each spans."""
    return [(group, len(list(found))) for group, found in itertools.groupby(column.group for column in table.columns)]
