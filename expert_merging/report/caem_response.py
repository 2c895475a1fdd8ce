"""Does it matter which task gets how many experts? The same sources merged by different shares."""

from functools import reduce
from operator import getitem
from statistics import fmean
from typing import Any

import numpy as np

from expert_merging.merging.registry import SHARES
from expert_merging.report import claims
from expert_merging.report.evidence import Evidence
from expert_merging.report.tables import Table, stat


def arms(e: Evidence) -> dict[str, str]:
    """{run: how it shares the experts out} of the runs that are there."""
    labels = {"": SHARES["entropy"], "-Avg": "evenly"}
    labels |= {f"-{shares}": label for shares, label in SHARES.items() if shares != "entropy"}
    labels |= {f"-{task}": f"all but the least to {task}" for task in e.tasks}
    return {f"CAEM-{e.n}{case}": label for case, label in labels.items() if e.get(f"CAEM-{e.n}{case}")}


def given(record: Any, e: Evidence) -> list[float]:
    """Experts a sparse layer that each task gave to the merged model, mean over the layers of both stacks."""
    layers = [layer for stack in e.stacks for layer in record["allocation"][stack]]
    return [fmean(layer[i] for layer in layers) for i in range(len(e.tasks))]


def points(e: Evidence, task: str, fine_tuned: bool) -> dict[int, list[tuple[float, float]]]:
    """{seed: (experts that the task got, its test score) of each arm}."""
    main, place = e.main_score(task), e.tasks.index(task)
    found: dict[int, list[tuple[float, float]]] = {}
    for name in arms(e):
        for seed, record in e.by_seed(name):
            scores = record[f"{task}_data"]["test"] if fine_tuned else record["before"]["test"][task]
            found.setdefault(seed, []).append((given(record, e)[place], scores[main]))
    return found


def slopes(e: Evidence, task: str, fine_tuned: bool) -> list[float]:
    """Of each seed, how much the task's score rises with an expert more (least squares over the arms)."""
    fits = []
    for of_seed in points(e, task, fine_tuned).values():
        experts, scores = np.array(of_seed).T
        if np.ptp(experts) > 0:
            fits.append(float(np.polyfit(experts, scores, 1)[0]))
    return fits


def response(e: Evidence) -> Table:
    """A row for each way to share, then the slope of each task's score over its experts, and what the shares matter in all."""
    note = (
        "Experts a layer from each task, mean over sparse layers; test scores after fine-tuning, Overall before too. Range: "
        "the best of a seed's shares less the worst, above 0 by chance alone, and more so the more shares there are."
    )
    table = Table("response", "The same sources merged by other shares", note)
    found = arms(e)
    if set(found) <= {f"CAEM-{e.n}", f"CAEM-{e.n}-Avg"}:
        return table
    for name, label in found.items():
        records = [one for (one,) in e.get(name)]
        row: dict[str, Any] = {"shares": label}
        row["experts"] = ", ".join(f"{fmean(one):.1f}" for one in zip(*(given(r, e) for r in records), strict=True))
        row["Overall before"] = stat([one["before"]["overall"]["test"] for one in records], 4)
        row["Overall"] = stat([one["overall"]["test"] for one in records], 4)
        for task in e.tasks:
            row[task] = stat([one[f"{task}_data"]["test"][e.main_score(task)] for one in records])
        table.rows.append(row | {"from": e.source(name)})
    for fine_tuned in (False, True):
        when = "after" if fine_tuned else "before"
        row = {"shares": f"points an expert, {when} fine-tuning", "experts": "", "Overall before": "", "Overall": ""}
        row |= {task: claims.shown(slopes(e, task, fine_tuned), 2) for task in e.tasks}
        table.rows.append(row | {"from": e.source(*found)})
    row = {"shares": "range over the shares", "experts": ""}
    row["Overall before"] = stat(ranges(e, "before", "overall", "test"), 4)
    row["Overall"] = stat(ranges(e, "overall", "test"), 4)
    row |= {task: stat(ranges(e, f"{task}_data", "test", e.main_score(task))) for task in e.tasks}
    table.rows.append(row | {"from": e.source(*found)})
    return table


def ranges(e: Evidence, *keys: str) -> list[float]:
    """Of each seed, the highest score among the arms less the lowest; `keys` lead to the score in a record."""
    of_seed: dict[int, list[float]] = {}
    for name in arms(e):
        for seed, record in e.by_seed(name):
            of_seed.setdefault(seed, []).append(reduce(getitem, keys, record))
    return [max(scores) - min(scores) for scores in of_seed.values() if len(scores) > 1]
