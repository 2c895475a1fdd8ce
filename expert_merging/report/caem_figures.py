"""Which figures the evidence for CAEM allows, and what is drawn in each."""

from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from expert_merging.merging.registry import METHODS
from expert_merging.report import caem_response, figures
from expert_merging.report.caem_scores import merging
from expert_merging.report.evidence import Evidence, start_and_epochs


def draw(e: Evidence, folder: Path) -> dict[str, str]:
    """Draw every figure that the records allow, as PNG and SVG; returns {name: caption}."""
    captions: dict[str, str] = {}
    first = next(iter(e.records))

    def drawn(name: str, caption: str, function: Any, *arguments: Any, **more: Any) -> None:
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

        def score(task: str, scores: dict[str, Any]) -> float:
            return scores[task][mains[task]]

        def loss(task: str, scores: dict[str, Any]) -> float:
            return scores[task]["loss"]

        by_score = {
            group: {
                "Overall": {x: start_and_epochs(e, x, partial(overall, group)) for x in members},
                **{t: {x: start_and_epochs(e, x, partial(score, t)) for x in members} for t in e.tasks},
            }
            for group, members in groups.items()
        }
        labels = {"Overall": "score / single-task score", **mains}
        caption = f"Scores on validation over epochs{seeds}; 0 is before the joint fine-tuning."
        drawn("scores_over_epochs", caption, figures.over_epochs, by_score, labels, goal="Overall")
        by_loss = {
            group: {t: {x: start_and_epochs(e, x, partial(loss, t)) for x in members} for t in e.tasks}
            for group, members in groups.items()
        }
        caption = f"Cross-entropy on validation over epochs{seeds}."
        drawn("loss_over_epochs", caption, figures.over_epochs, by_loss, dict.fromkeys(e.tasks, "nats a target token"))

    pairs = {pair: [one["cka"] for (one,) in e.get(pair) if "cka" in one] for pair in e.pairs()}
    if pairs := {pair: found for pair, found in pairs.items() if found}:
        caption = "Layer-wise linear CKA, before (dashed) and after (solid) fine-tuning (paper, figures 2 and 4)."
        drawn("cka", caption, figures.cka, pairs, e.tasks)
    lines = {}
    for pair in e.pairs():
        found = [one["line"] for (one,) in e.get(pair) if "line" in one]
        if found:
            lines[pair] = [(x["t"], [fmean(point) for point in zip(*x["loss"].values(), strict=True)]) for x in found]
    if lines:
        caption = "Validation loss (mean over tasks) on the line between two models; the soup is at the middle."
        drawn("lines_between", caption, figures.lines_between, lines)
    complexity = {}
    for experts in (e.n, e.m):
        if all(e.get(f"single-task-{experts} {task}") for task in e.tasks):
            complexity[f"single-task, {experts} experts"] = {
                stack: {
                    t: [one["entropy"][stack][t] for (one,) in e.get(f"single-task-{experts} {t}")] for t in e.tasks
                }
                for stack in e.stacks
            }
    if complexity:
        caption = "Entropy of expert use against the task: the single-task models, a dot a seed."
        drawn("entropy_by_task", caption, figures.entropy_by_task, complexity)
    usage = {task: [one["rows"] for (one,) in e.get(f"usage {task}")] for task in e.tasks}
    if all(usage.values()):
        caption = "Entropy of expert use when the same inputs are cut to a length, counted both ways."
        drawn("entropy_by_length", caption, figures.entropy_by_length, usage)
    if merged := merging(e).rows:
        values = {row["method"]: row["Overall"].values for row in merged if row["Overall"] is not None}
        if values:
            caption = "Overall on test of every way to merge the single-task models, a dot a seed; the bar is the mean."
            drawn("merging", caption, figures.overall_by_method, values)
    if caem_response.response(e).rows:
        panels = {
            f"{task}, {when}": caem_response.points(e, task, when == "after fine-tuning")
            for when in ("before fine-tuning", "after fine-tuning")
            for task in e.tasks
        }
        caption = (
            "A task's test score against the experts a layer that it got; a line a seed, least squares over the shares."
        )
        drawn("response", caption, figures.response, panels)
    for method in METHODS.values():
        record = e.records[first].get(f"merging-{e.n} {method.name}", {})
        if "routing" in record:
            caption = f"Mean routing weights of {method.label} on each task's test inputs, seed {first}."
            drawn(f"routing_{method.name}", caption, figures.routing, record)
    for name in names:
        if name not in e.records[first]:
            continue
        record = e.records[first][name]
        caption = f"Expert use of {name} on validation, seed {first} (paper, figure 3)."
        drawn(f"expert_use_{name}", caption, figures.expert_use, record)
        if "weights" in record:
            drawn(f"allocation_{name}", f"Experts from each task in {name}, seed {first}.", figures.allocation, record)
    return captions


def _goal(e: Evidence, experts: int, task: str) -> float:
    """Validation score of the single-task model, mean over seeds."""
    found = [one for (one,) in e.get(f"single-task-{experts} {task}")]
    values = [one[f"{task}_data"]["validation"][one["best_epoch"] - 1][e.main_score(task)] for one in found]
    return fmean(values) if values else 0.0
