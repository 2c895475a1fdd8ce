"""Tables of expert use: entropies, allocations, and how entropy depends on the input length and the way of counting."""

import itertools
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from expert_merging.report.evidence import Evidence, entropy
from expert_merging.report.tables import Table, stat

PAPER_ENTROPIES = {"CAEM-8": (0.4524, 0.5923), "CAEM-8-to-16": (0.3345, 0.5312), "CAEM-16": (0.3966, 0.4677)}


def entropies(e: Evidence) -> Table:
    """Of the single-task models, by which CAEM shares experts, and table 3 for all configurations."""
    table = Table(
        "entropies", "Expert-usage entropy: the tasks' complexity, and after multi-task training (table 3)",
        "Normalised entropy on validation, mean over tasks and sparse layers: 1 is even use, 0 is one expert for all. Pooled: "
        "of the tasks' uses added up. Distance: Jensen-Shannon's between the uses of two tasks, mean over pairs and layers: 0 "
        "is the same use, 1 no expert in common.",
    )  # fmt: skip
    alone = [f"single-task-{experts} {task}" for experts in (e.n, e.m) for task in e.tasks]
    for name in [*(name for name in alone if e.get(name)), *e.multi_task()]:
        row: dict[str, Any] = {"configuration": name}
        found = [one for (one,) in e.get(name)]
        for stack in e.stacks:
            row[stack] = stat([fmean(entropy(one, stack, task) for task in one["usage"][stack]) for one in found], 4)
            together = found if name not in alone else []
            row[f"{stack}, pooled"] = stat([pooled_entropy(one, stack) for one in together], 4)
            row[f"{stack}, distance"] = stat([task_distance([one["usage"][stack]]) for one in together], 3)
        if e.scale == "paper":
            paper = PAPER_ENTROPIES.get(name, (None, None))
            row |= {"paper: encoder": paper[0], "paper: decoder": paper[1]}
        table.rows.append(row | {"from": e.source(name)})
    return table


def pooled_entropy(record: Any, stack: str) -> float:
    """Normalised entropy of the use of all tasks together, each with the same weight, mean over sparse layers."""
    shares = np.mean([_shares(grid) for grid in record["usage"][stack].values()], axis=0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return float((-(shares * logs).sum(1) / np.log(shares.shape[1])).mean())


def task_distance(uses: Sequence[dict[str, Any]]) -> float:
    """Jensen-Shannon distance (base 2) between the expert use of two tasks, mean over pairs of tasks and sparse layers.

    Args:
        uses: {task: [sparse layer][expert] tokens} of one model, or of several that hold a task each.
    """
    from scipy.spatial.distance import jensenshannon

    shares = [_shares(grid) for use in uses for grid in use.values()]
    return float(np.mean([jensenshannon(a, b, base=2, axis=1) for a, b in itertools.combinations(shares, 2)]))


def _shares(grid: Sequence[Sequence[int]]) -> np.ndarray:
    counts = np.asarray(grid, dtype=float)
    return counts / counts.sum(1, keepdims=True).clip(min=1)


def allocation(e: Evidence) -> Table:
    """Experts from each task in each sparse layer."""
    table = Table(
        "allocation", "Experts from each task",
        "In each sparse layer, a number a seed; and the weight with which each task enters all other tensors of the stack.",
    )  # fmt: skip
    for name in e.multi_task():
        found = [one for (one,) in e.get(name) if "weights" in one]
        counts = [one["allocation"] for one in found]
        for stack in e.stacks:
            for layer in range(len(counts[0][stack]) if found else 0):
                row = {"configuration": name, "stack": stack, "sparse layer": str(layer + 1)}
                for number, task in enumerate(e.tasks):
                    row[task] = ", ".join(str(one[stack][layer][number]) for one in counts)
                table.rows.append(row | {"from": e.source(name)})
            if found:
                row = {"configuration": name, "stack": stack, "sparse layer": "weight"}
                for number, task in enumerate(e.tasks):
                    row[task] = ", ".join(f"{one['weights'][stack][number]:.3f}" for one in found)
                table.rows.append(row | {"from": e.source(name)})
    return table


def entropy_by_length(e: Evidence) -> Table:
    """The audit: the same task and model, inputs cut to several lengths, counted both ways."""
    table = Table(
        "entropy_by_length", "Entropy against input length",
        "Single-task models on their validation inputs cut to a length: real tokens before the capacity cut (paper), or "
        "all positions of inputs padded to the limit, after it (released). Mean over sparse layers.",
    )  # fmt: skip
    for task in e.tasks:
        found = [one["rows"] for (one,) in e.get(f"usage {task}")]
        lengths = dict.fromkeys(row["input_length"] for rows in found for row in rows)
        for length in lengths:
            cell: dict[str, Any] = {"task": task, "cut to": length}
            same = [row for rows in found for row in rows if row["input_length"] == length]
            cell["mean tokens"] = round(fmean(row["mean_length"] for row in same), 1)
            for stack in e.stacks:
                for counting in ("paper", "released"):
                    values = [fmean(row["entropy"][stack]) for row in same if row["counting"] == counting]
                    cell[f"{stack}, {counting}"] = stat(values, 4)
            table.rows.append(cell | {"from": e.source(f"usage {task}")})
    return table
