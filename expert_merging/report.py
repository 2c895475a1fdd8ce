"""Tables and figures from the histories on disk. Imports no model: whoever has the JSON files can make them again."""

import csv
import io
from pathlib import Path
from typing import Any

from expert_merging import plots
from expert_merging.files import write_atomic, write_json


def score_rows(
    tasks: dict[str, str],
    references: dict[str, Any],
    singles: dict[str, dict[str, Any]],
    runs: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of the table of results, on the test split.

    Args:
        tasks: task -> name of its main score.
        references: row label -> {"test": {task: scores}, "overall": number or None}, of what needs no training.
        singles: task -> history of its single-task model.
        runs: configuration -> history of a multi-task model; one with "before" gets a row for that too.
    """

    def row(label, test, overall, parameters=None, seconds=None, source=None):
        return {
            "configuration": label, "Overall": overall, **{task: test[task][main] for task, main in tasks.items()},
            "parameters": parameters, "seconds": seconds, "file": source,
        }  # fmt: skip

    rows = [row(label, one["test"], one["overall"]["test"], source=one.get("file")) for label, one in references.items()]
    test = {task: history[f"{task}_data"]["test"] for task, history in singles.items()}
    one = next(iter(singles.values()))
    seconds = sum(history["seconds"] for history in singles.values())
    files = " ".join(history["file"] for history in singles.values())
    rows.append(row(f"single-task models ({len(singles)})", test, 1.0, one["parameters"], seconds, files))
    for label, history in runs.items():
        test = {task: history[f"{task}_data"]["test"] for task in tasks}
        if "before" in history:
            before = history["before"]
            rows.append(
                row(
                    f"{label}, merged only",
                    before["test"],
                    before["overall"]["test"],
                    history["parameters"],
                    None,
                    history["file"],
                )
            )
        rows.append(
            row(label, test, history["overall"]["test"], history["parameters"], history["seconds"], history["file"])
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table; numbers to two places, Overall and entropies to four."""
    columns = list(rows[0])
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---" if i == 0 else "---:" for i in range(len(columns))) + "|",
    ]
    lines += ["| " + " | ".join(_cell(name, row[name]) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "parameters":
        return f"{value / 1e6:.2f}M"
    if isinstance(value, float):
        return (
            f"{value:.0f}"
            if name == "seconds"
            else f"{value:.4f}"
            if name in ("Overall", "entropy")
            else f"{value:.2f}"
        )
    return str(value)


def csv_text(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as CSV, unrounded."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def allocation_rows(history: dict[str, Any]) -> list[dict[str, Any]]:
    """Experts that each task got in each sparse layer of a merged model, with the entropies they follow from."""
    rows = []
    for stack, key in (("encoder", "en"), ("decoder", "de")):
        for layer, counts in enumerate(history[f"record_stay_num_experts_{key}"]):
            entropies = history["entropies"][stack]
            row: dict[str, Any] = {"stack": stack, "sparse layer": layer + 1}
            for number, task in enumerate(history["tasks"]):
                row[task] = f"{counts[number]} (H {entropies[number][layer]:.3f})"
            rows.append(row)
    weights = history["weights"]
    for stack in ("encoder", "decoder"):
        row = {"stack": stack, "sparse layer": "weight w"}
        rows.append(row | {task: f"{weights[stack][n]:.4f}" for n, task in enumerate(history["tasks"])})
    return rows


def entropy_rows(singles: dict[str, dict[str, Any]], runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean normalised entropy of expert use on validation, over the sparse layers of each stack (as the paper's table 3)."""
    rows = []
    named = [(f"single-task, {task}", history) for task, history in singles.items()] + list(runs.items())
    for label, history in named:
        for task in history["tasks"]:
            row: dict[str, Any] = {"configuration": label, "task": task}
            for stack, key in (("encoder", "entropy"), ("decoder", "entropy_de")):
                row[stack] = f"{sum(history[key][task]) / len(history[key][task]):.4f}"
            rows.append(row)
    return rows


def write_report(
    folder: Path,
    title: str,
    tasks: dict[str, str],
    references: dict[str, Any],
    singles: dict[str, Any],
    runs: dict[str, Any],
) -> str:
    """Write the tables (Markdown, CSV, JSON) and figures into `folder`; returns the tables' text."""
    scores = score_rows(tasks, references, singles, runs)
    parts = [f"# {title}", "Test scores; Overall is the mean over tasks of score / single-task score.", ""]
    shown = [{name: value for name, value in row.items() if name != "file"} for row in scores]
    parts += [markdown(shown)]
    for label, history in runs.items():
        if "record_stay_num_experts_en" in history:
            parts += [
                "",
                f"## {label}: experts from each task, with the entropy of its usage",
                "",
                markdown(allocation_rows(history)),
            ]
            plots.allocation(history, folder / f"allocation_{label}.png")
        plots.expert_use(history, folder / f"expert_use_{label}.png")
    for task, history in singles.items():
        plots.expert_use(history, folder / f"expert_use_single_task_{task}.png")
    parts += ["", "## Mean normalised entropy of expert use on validation", "", markdown(entropy_rows(singles, runs))]
    goals = {
        task: history[f"{task}_data"]["validation"][history["best_epoch"] - 1][tasks[task]]
        for task, history in singles.items()
    }
    plots.training_curves(runs, goals, folder / "training_curves.png")
    text = "\n".join(parts) + "\n"
    write_json(folder / "table.json", scores)
    write_atomic(folder / "table.csv", csv_text(scores))
    write_atomic(folder / "table.md", text)
    return text
