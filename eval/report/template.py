"""The page: one file with its style and pictures inside, which asks no network for anything."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { --ink: #1d2329; --faint: #66717c; --line: #dfe4e8; --best: #0b6e4f; --bar: #cfe5dc; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 76rem; color: var(--ink); background: #fff;
       font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.6rem; }
h2 { margin: 2.75rem 0 .75rem; padding-bottom: .3rem; font-size: 1.2rem; border-bottom: 2px solid var(--line); }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
p, .faint { color: var(--faint); margin: 0 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--faint); font-weight: 600; }
tbody th { font-weight: 500; white-space: nowrap; }
td.value { text-align: right; white-space: nowrap; }
td.best { color: var(--best); font-weight: 700; }
td.text { max-width: 26rem; overflow-wrap: anywhere; }
tr.differs th, tr.differs td { background: #fff8e1; }
.bar { display: block; height: 4px; margin-top: 2px; background: var(--bar); }
.remarks { margin: 1rem 0; padding: .75rem 1rem .75rem 2rem; background: #fdecea; color: var(--bad); }
.sheet { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
.sheet.wide { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
figure { margin: 0; }
figure img { display: block; width: 100%; border-radius: 4px; background: #f1f3f5; }
img.pixels { image-rendering: pixelated; }
figcaption { margin-top: .25rem; font-size: .78rem; line-height: 1.3; overflow-wrap: anywhere; }
.pairs { grid-template-columns: repeat(auto-fill, minmax({{ 7 * runs | length }}rem, 1fr)); }
.row { display: flex; gap: .25rem; }
.row img { flex: 1 1 0; min-width: 0; }
.reason { color: var(--bad); white-space: pre-line; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for subtitle in subtitles %}<p>{{ subtitle }}</p>
{% endfor %}
{% macro table(it, id, bars=false) %}
<div class="scroll"><table id="{{ id }}">
<thead><tr><th></th>{% for column in it.columns %}<th>{{ column }}</th>{% endfor %}<th></th></tr></thead>
<tbody>
{% for line in it.lines %}
<tr{% if line.note == "differs" %} class="differs"{% endif %}><th>{{ line.title }}</th>
{% for cell in line.cells %}<td class="{{ 'text' if cell.value is none else 'value' }}\
{{ ' best' if cell.best }}">{{ cell.text }}{% if bars and cell.value is not none %}\
<span class="bar" style="width: {{ widths(line.cells, it)[loop.index0] }}%"></span>{% endif %}</td>{% endfor %}
<td class="faint">{{ line.note }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}

{% if remarks %}<ul class="remarks" id="remarks">
{% for remark in remarks %}<li>{{ remark }}</li>{% endfor %}
</ul>{% endif %}

<h2>Scores</h2>
{% if headline.lines %}{{ table(headline, "scores") }}
<p>value \u00b1 standard error; green is the best of a line</p>
{% else %}<p id="no-scores">No scores yet: <code>megadit eval score METRIC DIR</code> writes them.</p>{% endif %}

{% if groups %}<h2>By category</h2>
{% for it in groups %}<h3>{{ it.title }}</h3>{{ table(it, "groups-%d" % loop.index, true) }}{% endfor %}{% endif %}

{% if pairs %}<h2>Side by side</h2>
<p>The same prompts and the same noise; from left to right: {{ runs | map(attribute="name") | join(", ") }}.</p>
<div class="sheet pairs" id="pairs">
{% for row in pairs %}<figure><div class="row">\
{% for picture in row.pictures %}<img class="{{ picture.style }}" src="{{ picture.url }}" alt="">{% endfor %}</div>
<figcaption>{{ row.caption }}</figcaption></figure>
{% endfor %}</div>{% endif %}

{% for sheet in sheets %}<h2>Images of {{ sheet.name }}</h2>
<p>{{ sheet.pictures | length }} of {{ sheet.num_units }}, evenly spaced.</p>
<div class="sheet" id="sheet-{{ loop.index }}">
{% for picture in sheet.pictures %}<figure><img class="{{ picture.style }}" src="{{ picture.url }}" alt="">\
<figcaption>{{ picture.caption }}</figcaption></figure>
{% endfor %}</div>{% endfor %}

{% for it in failures %}<h2>What {{ it.metric }} judged wrong in {{ it.name }}</h2>
<div class="sheet wide failures">
{% for failure in it.failures %}<figure><img src="{{ failure.url }}" alt="">
<figcaption>{{ failure.caption }} <span class="faint">({{ failure.tag }})</span>\
<br><span class="reason">{{ failure.reason }}</span></figcaption></figure>
{% endfor %}</div>{% endfor %}

<h2>How the images were made</h2>
{{ table(settings, "settings") }}
</body>
</html>
"""
