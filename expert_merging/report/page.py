"""The report of an experiment as one page of HTML."""

import base64
import html
import json
from pathlib import Path
from typing import Any

from expert_merging.core.files import read_json
from expert_merging.report.records import Groups, every
from expert_merging.report.tables import Table

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 60rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.4rem; border-bottom: 1px solid #d5d9de; }
p.note, figcaption { color: #57606a; font-size: .88rem; max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .83rem; margin: .6rem 0 1rem; border: solid; border-width: 1.5px 0; }
th { text-align: left; border-bottom: 1px solid; font-weight: 600; }
td, th { padding: .22rem .7rem .22rem 0; vertical-align: top; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
nav { font-size: .88rem; columns: 2; } pre { font-size: .78rem; white-space: pre-wrap; background: #f6f8fa; padding: .8rem; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; } nav { display: none; } .wide { overflow: visible; }
  table { font-size: 7.5pt; } figure, tr, h2 { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def page(title: str, groups: Groups, tables: list[Table], captions: dict[str, str], folder: Path) -> str:
    """The report as one HTML page that needs no other file.

    Args:
        captions: what is to be said of each figure, {name: caption}, in order.
        folder: of the report, with the figures and, where they were noted, the times of its runs.
    """
    times = read_json(folder / "times.json")["steps"] if (folder / "times.json").exists() else []
    records = [record for _, _, record in every(groups) if "versions" in record]
    parts = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>", f"<h1>{title}</h1>",
        f'<p class="note">Records: {html.escape(", ".join(groups))}. Rest the pointer on the first cell of a row to see which '
        "it is made of.</p>", "<nav><ul>",
        *(f'<li><a href="#{table.name}">{html.escape(table.title)}</a></li>' for table in tables),
        '<li><a href="#figures">Figures</a></li><li><a href="#provenance">Provenance</a></li></ul></nav>',
    ]  # fmt: skip
    for table in tables:
        parts += [
            f'<h2 id="{table.name}">{html.escape(table.title)}</h2>',
            f'<p class="note">{html.escape(table.note)}</p>',
        ]
        parts.append(f'<div class="wide">{table.html()}</div>')
    parts.append('<h2 id="figures">Figures</h2>')
    for name, caption in captions.items():
        drawing, text = folder / "figures" / f"{name}.svg", html.escape(caption)
        kind = "svg+xml" if drawing.exists() else "png"
        data = base64.b64encode(drawing.with_suffix(f".{kind[:3]}").read_bytes()).decode()
        image = f'<img alt="{text}" src="data:image/{kind};base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
    parts += ['<h2 id="provenance">Provenance</h2>', *_provenance(records, times), "</body></html>"]
    return "\n".join(parts) + "\n"


def _provenance(records: list[dict[str, Any]], times: list[dict[str, Any]]) -> list[str]:
    versions = sorted({json.dumps(record["versions"], sort_keys=True) for record in records})
    trained = [record for record in records if "selection" in record]
    machines = sorted({f"{r['device']}, {r['processes']} process(es), {r['threads']} thread(s)" for r in trained})
    lines = ["<p>Versions (and the repository's commit) that the runs noted:</p>"]
    lines += [f"<pre>{html.escape(version)}</pre>" for version in versions]
    if machines:
        lines.append(f"<p>Ran on: {html.escape('; '.join(machines))}.</p>")
    if times:
        seconds = sum(row["seconds"] for row in times)
        joules = [row["joules"] for row in times if row["joules"] is not None]
        energy = (
            f"{sum(joules) / 3.6e6:.3f} kWh drawn by the GPUs" if joules else "no energy was measured (no nvidia-smi)"
        )
        lines.append(f"<p>Wall time of the {len(times)} steps noted: {seconds / 3600:.2f} h; {energy}.</p>")
    shared = [record["identity"] for record in trained]
    if shared:
        same = {key: value for key, value in shared[0].items() if all(one.get(key) == value for one in shared)}
        lines += [
            "<p>Constants that all training runs share:</p>",
            f"<pre>{html.escape(json.dumps(same, indent=1))}</pre>",
        ]
    commands = sorted({record["command"] for record in records})
    return [*lines, "<p>Commands:</p>", f"<pre>{html.escape(chr(10).join(commands))}</pre>"]
