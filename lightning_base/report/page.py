"""The report as one HTML page that needs nothing else: no network, no scripts."""

import base64
import itertools
from collections.abc import Sequence

from jinja2 import Environment, StrictUndefined

from lightning_base.report.document import Document, column_help
from lightning_base.report.picture import Picture
from lightning_base.report.style import CSS
from lightning_base.report.table import Table

BODY = """\
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
{% for section, drawn in sections %}
<section class="comparison">
{% if sections|length > 1 %}
<h2>{{ section.title }}</h2>
{% endif %}
{% if section.apart %}
<aside class="apart"><p>Not comparable with the first table. Here differ:</p>
<ul>{% for line in section.apart %}<li>{{ line }}</li>{% endfor %}</ul></aside>
{% endif %}
<div class="summary">
<p class="lead">{{ section.summary[0] }}</p>
{% if section.summary|length > 1 %}
<ul>{% for sentence in section.summary[1:] %}<li>{{ sentence }}</li>{% endfor %}</ul>
{% endif %}
</div>
{% for text in section.cautions %}<p class="caution">{{ text }}</p>{% endfor %}
{% for table in section.tables %}
<h3>{{ table.title }}</h3>
{% if table.lead %}<p class="note">{{ table.lead }}</p>
{% endif %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ table.title }}">
<table>
<thead>
<tr class="groups">{% for group, size in groups(table) %}<th colspan="{{ size }}" scope="colgroup">{{ group }}</th>\
{% endfor %}</tr>
<tr>{% for column in table.columns %}<th scope="col" title="{{ column.help }}"\
{% if column.words %} class="words"{% endif %}>{{ column.heading }}</th>\
{% endfor %}</tr>
</thead>
<tbody>
{% for row in table.rows %}
<tr{% if table.columns[1].words and row[0] != table.rows[loop.index0 - 1][0] %} class="next"{% endif %}>\
<th scope="row">{{ row[0] }}</th>{% set line = loop.index0 %}\
{% for text in row[1:] %}<td{% if (line, loop.index) in table.strong %} class="best"\
{% elif table.columns[loop.index].words %} class="words"{% endif %}>{{ text }}</td>\
{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% for note in table.notes %}<p class="note">{{ note }}</p>{% endfor %}
{% endfor %}
<h3>Figures</h3>
<div class="figures">
{% for picture in drawn %}
<figure{% if "load" in picture.name %} class="wide"{% endif %}>
<h4>{{ picture.title }}</h4>
<div class="scroll" tabindex="0" role="region" aria-label="{{ picture.title }}">\
<img \
style="max-width:{{ (picture.width * 6.5)|round(1) }}rem" \
alt="{{ picture.title }}: {{ picture.caption }}" src="data:image/svg+xml;base64,{{ encoded(picture.svg) }}"></div>
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}
</div>
<h3>What the arms share</h3>
<dl class="facts">{% for name, value in section.made_with %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>\
{% endfor %}</dl>
<h3>Each run</h3>
{% for run in section.details %}
<details><summary>{{ run.label }} <small>{{ run.directory }}</small></summary>
<h4>Started with</h4><pre>{{ run.command }}</pre>
<h4>Ledger: what it spent</h4><pre>{{ run.ledger }}</pre>
<h4>Certificate: what it was</h4><pre>{{ run.certificate }}</pre>
<h4>Configuration</h4><pre>{{ run.config }}</pre>
</details>
{% endfor %}
</section>
{% endfor %}
{% if document.left_out %}
<section><h2>Not in any table</h2>
<ul class="leftout">{% for job in document.left_out %}
<li><strong>{{ job.label }}</strong> <span class="state">{{ job.state }}</span> {{ job.reason }}
{% if job.details %}<details><summary>traceback</summary><pre>{{ job.details }}</pre></details>{% endif %}</li>
{% endfor %}</ul></section>
{% endif %}
<section><h2>How to read the columns</h2>
<dl class="help">{% for name, text in help %}<dt>{{ name }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>
</section>
</main>
</body>
</html>
"""


def html(document: Document, pictures: Sequence[Sequence[Picture]]) -> str:
    """The page; whatever comes from files is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    tables = [table for section in document.sections for table in section.tables]
    return environment.from_string(BODY).render(
        document=document,
        sections=list(zip(document.sections, pictures, strict=True)),
        css=CSS,
        help=column_help(tables),
        groups=heading_groups,
        encoded=lambda content: base64.b64encode(content).decode(),
    )


def heading_groups(table: Table) -> list[tuple[str, int]]:
    """The headings above the headings, with the number of columns each spans."""
    return [(group, len(list(found))) for group, found in itertools.groupby(column.group for column in table.columns)]
