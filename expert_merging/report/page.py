"""The report of an experiment: tables, figures and one page of HTML, from the records on disk."""

import base64
import html
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from expert_merging.core.files import new_folder, read_json, write_atomic
from expert_merging.report import caem_tables, figures
from expert_merging.report.caem_tables import STACKS, Evidence
from expert_merging.report.publish import texts
from expert_merging.report.tables import Table


def write(folder: Path) -> list[Table]:
    """Write tables, figures and report.html into `folder` from the records there; returns the tables."""
    e = caem_tables.read(folder)
    tables = caem_tables.all_tables(e)
    with new_folder(folder / "tables") as place:
        for table in tables:
            for name, text in texts(table).items():
                write_atomic(place / name, text)
    with new_folder(folder / "figures") as place:
        captions = draw_figures(e, place)
    times = read_json(folder / "times.json")["steps"] if (folder / "times.json").exists() else []
    write_atomic(folder / "report.html", page(e, tables, captions, folder / "figures", times))
    return tables


def draw_figures(e: Evidence, folder: Path) -> dict[str, str]:
    """Draw every figure that the records allow, as PNG and SVG; returns {name: caption}."""
    captions: dict[str, str] = {}
    first = next(iter(e.records))

    def draw(name: str, caption: str, function: Any, *arguments: Any, **more: Any) -> None:
        for kind in ("png", "svg"):
            function(*arguments, folder / f"{name}.{kind}", **more)
        captions[name] = caption

    names = e.multi_task()
    few = [x for x in names if not x.endswith(f"{e.m}") and not x.endswith(f"{e.m}-Avg")]
    groups = {f"{e.n} experts": few, f"{e.m} experts": [x for x in names if x not in few]}
    groups = {group: members for group, members in groups.items() if members}
    seeds = "" if len(e.records) == 1 else f", mean and standard deviation over {len(e.records)} seeds"
    if names:
        mains = {task: e.main_score(task) for task in e.tasks}
        goals = {
            (group, task): _goal(e, e.m if group.startswith(f"{e.m} ") else e.n, task)
            for group in groups
            for task in e.tasks
        }

        def overall(group: str, scores: dict[str, Any]) -> float:
            ratios = [scores[t][mains[t]] / goals[group, t] for t in e.tasks if goals[group, t] > 0]
            return fmean(ratios) if ratios else 0.0

        by_score = {
            group: {
                "Overall": {x: caem_tables.start_and_epochs(e, x, lambda s, g=group: overall(g, s)) for x in members},
                **{t: {x: caem_tables.start_and_epochs(e, x, lambda s, t=t: s[t][mains[t]]) for x in members} for t in e.tasks},
            }
            for group, members in groups.items()
        }  # fmt: skip
        labels = {"Overall": "score / single-task score", **mains}
        caption = f"Scores on validation over epochs{seeds}; 0 is before the joint fine-tuning."
        draw("scores_over_epochs", caption, figures.over_epochs, by_score, labels, goal="Overall")
        by_loss = {
            group: {
                t: {x: caem_tables.start_and_epochs(e, x, lambda s, t=t: s[t]["loss"]) for x in members} for t in e.tasks
            }
            for group, members in groups.items()
        }
        caption = f"Cross-entropy on validation over epochs{seeds}."
        draw("loss_over_epochs", caption, figures.over_epochs, by_loss, dict.fromkeys(e.tasks, "nats a target token"))

    pairs = {pair: [one["cka"] for (one,) in e.get(pair) if "cka" in one] for pair in e.pairs()}
    if pairs := {pair: found for pair, found in pairs.items() if found}:
        caption = "Layer-wise linear CKA, before (dashed) and after (solid) fine-tuning (paper, figures 2 and 4)."
        draw("cka", caption, figures.cka, pairs, e.tasks)
    lines = {}
    for pair in e.pairs():
        found = [one["line"] for (one,) in e.get(pair) if "line" in one]
        if found:
            lines[pair] = [(x["t"], [fmean(point) for point in zip(*x["loss"].values(), strict=True)]) for x in found]
    if lines:
        caption = "Validation loss (mean over tasks) on the line between two models; the soup is at the middle."
        draw("lines_between", caption, figures.lines_between, lines)
    complexity = {}
    for experts in (e.n, e.m):
        if all(e.get(f"single-task-{experts} {task}") for task in e.tasks):
            complexity[f"single-task, {experts} experts"] = {
                stack: {t: [one[key][t] for (one,) in e.get(f"single-task-{experts} {t}")] for t in e.tasks}
                for stack, key in STACKS.items()
            }
    if complexity:
        caption = "Entropy of expert use against the task: the single-task models, a dot a seed."
        draw("entropy_by_task", caption, figures.entropy_by_task, complexity)
    usage = {task: [one["rows"] for (one,) in e.get(f"usage {task}")] for task in e.tasks}
    if all(usage.values()):
        caption = "Entropy of expert use when the same inputs are cut to a length, counted both ways."
        draw("entropy_by_length", caption, figures.entropy_by_length, usage)
    if merged := caem_tables.merging(e).rows:
        values = {row["method"]: row["Overall"].values for row in merged if row["Overall"] is not None}
        if values:
            caption = "Overall on test of every way to merge the single-task models, a dot a seed; the bar is the mean."
            draw("merging", caption, figures.overall_by_method, values)
    for method, (label, _) in caem_tables.MERGING.items():
        record = e.records[first].get(f"merging-{e.n} {method}", {})
        if "routing" in record:
            caption = f"Mean routing weights of {label} on each task's test inputs, seed {first}."
            draw(f"routing_{method}", caption, figures.routing, record)
    for name in names:
        if name not in e.records[first]:
            continue
        record = e.records[first][name]
        caption = f"Expert use of {name} on validation, seed {first} (paper, figure 3)."
        draw(f"expert_use_{name}", caption, figures.expert_use, record)
        if "weights" in record:
            draw(f"allocation_{name}", f"Experts from each task in {name}, seed {first}.", figures.allocation, record)
    return captions


def _goal(e: Evidence, experts: int, task: str) -> float:
    """Validation score of the single-task model, mean over seeds."""
    found = [one for (one,) in e.get(f"single-task-{experts} {task}")]
    values = [one[f"{task}_data"]["validation"][one["best_epoch"] - 1][e.main_score(task)] for one in found]
    return fmean(values) if values else 0.0


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


def page(e: Evidence, tables: list[Table], captions: dict[str, str], folder: Path, times: list[dict[str, Any]]) -> str:
    """The report as one HTML page that needs no other file."""
    seeds = ", ".join(map(str, e.records))
    title = f"CAEM-MoE at scale {e.scale}"
    records = [record for of_seed in e.records.values() for record in of_seed.values() if "identity" in record]
    parts = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>", f"<h1>{title}</h1>",
        f'<p class="note">Seeds {seeds}; tasks {", ".join(e.tasks)}. Rest the pointer on the first cell of a row to see the '
        "records that it is made of.</p>", "<nav><ul>",
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
        data = base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
        text = html.escape(caption)
        image = f'<img alt="{text}" src="data:image/svg+xml;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
    parts += ['<h2 id="provenance">Provenance</h2>', *_provenance(records, times), "</body></html>"]
    return "\n".join(parts) + "\n"


def _provenance(records: list[dict[str, Any]], times: list[dict[str, Any]]) -> list[str]:
    versions = sorted({json.dumps(record["versions"], sort_keys=True) for record in records})
    trained = [record for record in records if "selection" in record]
    machines = sorted({f"{r['device']}, {r['processes']} process(es), {r['threads']} thread(s)" for r in trained})
    lines = ["<p>Versions (and the repository's commit) that the runs noted:</p>"]
    lines += [f"<pre>{html.escape(version)}</pre>" for version in versions]
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
