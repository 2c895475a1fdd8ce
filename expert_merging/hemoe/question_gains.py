"""What the scores of single questions tell: accuracy task by task, and differences at equal activated share with intervals
over questions and seeds (analysis/crossed_bootstrap.py)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from expert_merging.analysis import crossed_bootstrap as bootstrap
from expert_merging.core.errors import UserError
from expert_merging.data.scores import unpack
from expert_merging.hemoe.record_checks import tasks_of
from expert_merging.report.records import Groups, source
from expert_merging.report.tables import Table, stat

_NOTE = (
    "Difference in accuracy (points, mean over tasks) of two curves over activated share, mean over the shares that both cover "
    f"[95% interval, bootstrap crossed over seeds and questions, {bootstrap.METHOD}; of one seed over questions alone]. By the "
    "interval alone, uncorrected for the number of rows."
)


def by_task(records: Groups, methods: Sequence[str], labels: dict[str, str]) -> Table:
    """A row a model and number of experts that fire: accuracy (%) of each task, by lm_eval's acc_norm where it has one."""
    note = "0-shot accuracy (%) by lm_eval, acc_norm where a task has it, else acc; share: of the experts' neurons, active."
    table = Table("by_task", "Accuracy task by task", note)
    for method in methods:
        found = [of_seed[method] for of_seed in records.values() if _has_each(of_seed.get(method))]
        for k in dict.fromkeys(k for one in found for k in one["k"]):
            points = [one["k"][k] for one in found if k in one["k"]]
            shares = [np.mean(list(point["share"].values())) if "share" in point else 1.0 for point in points]
            fire = "all" if k == "0" else k
            row: dict[str, Any] = {"model": labels.get(method, method), "fire": fire, "share": stat(shares, 3)}
            for task in points[0]["accuracy"]:
                row[task] = stat([100 * point["accuracy"][task] for point in points], 1)
            row["mean"] = stat([100 * np.mean(list(point["accuracy"].values())) for point in points], 1)
            table.rows.append(row | {"from": source(records, method)})
    return table


def gains(records: Groups, questions: Sequence[tuple[str, str, str]], labels: dict[str, str]) -> Table:
    """A row a question (what is asked, a method, another), as far as both have every question's score."""
    table = Table("question_gains", "Where the gain comes from, question by question", _NOTE)
    asked = []
    for question, one, other in questions:
        pairs = [(of, of.get(one), of.get(other)) for of in records.values()]
        seeds = [of for of, *pair in pairs if all(map(_has_each, pair)) and comparable(*pair)]
        if seeds:
            asked.append((question, one, other, seeds))
    for question, one, other, seeds in asked:
        mean, low, high = difference([of[one] for of in seeds], [of[other] for of in seeds])
        table.rows.append({
            "question": question, "difference": f"{labels.get(one, one)} - {labels.get(other, other)}", "seeds": len(seeds),
            "accuracy": f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]", "verdict": bootstrap.side(low, high, len(seeds)),
            "from": source(records, one, other),
        })  # fmt: skip
    return table


def comparable(one: Any, other: Any) -> bool:
    """Whether two records are there that were asked the same tasks, and whose curves cover some activated shares both."""
    if one is None or other is None or tasks_of(one) != tasks_of(other):
        return False
    low, high = zip(*(_ends(record) for record in (one, other)), strict=True)
    return max(low) < min(high)


def _ends(record: Any) -> tuple[float, float]:
    shares = [np.mean(list(point["share"].values())) for point in record["k"].values() if "share" in point]
    return (min(shares), max(shares)) if shares else (1.0, 1.0)


def difference(one: Sequence[Any], other: Sequence[Any]) -> tuple[float, float, float]:
    """(mean, lower and upper end of its 95% interval) of the first method's curve less the second's, records of the same
    seeds. Raises UserError where seeds were not asked the same questions."""
    methods = (one, other)
    ks = [sorted(set.intersection(*(set(record["k"]) for record in records)), key=int) for records in methods]
    models = {
        f"{number} {k}": _scores([record["k"][k] for record in records])
        for number, records in enumerate(methods)
        for k in ks[number]
    }
    weights = _weights(methods, ks)
    means = bootstrap.resample(models)

    def of_curves(*arms: bootstrap.Scores) -> np.ndarray:
        accuracies = np.stack([np.mean(list(arm.values()), axis=0) for arm in arms], axis=-1)  # [draws, seeds, points]
        return (accuracies * weights).sum(-1)

    return bootstrap.estimate(of_curves, list(means.values()))


def _weights(methods: Sequence[Sequence[Any]], ks: Sequence[Sequence[str]]) -> np.ndarray:
    """[seeds, points of both]: with which the mean over shares of the difference of two curves, by straight lines between
    points, weighs each point."""
    rows = []
    for records in zip(*methods, strict=True):
        shares = [
            np.array([np.mean(list(record["k"][k]["share"].values())) for k in of_ks])
            for record, of_ks in zip(records, ks, strict=True)
        ]
        low, high = max(one.min() for one in shares), min(one.max() for one in shares)
        grid = np.linspace(low, high, 201)
        parts = []
        for sign, of_method in zip((1, -1), shares, strict=True):
            order = np.argsort(of_method)
            lines = [np.interp(grid, of_method[order], unit[order]).mean() for unit in np.eye(len(of_method))]
            parts.append(sign * np.array(lines))
        rows.append(np.concatenate(parts))
    return np.array(rows)


def _scores(points: Sequence[Any]) -> dict[str, np.ndarray]:
    """{task: [seeds, questions]}"""
    found = {task: [unpack(point["each"][task]) for point in points] for task in points[0]["each"]}
    if wrong := [task for task, of_seeds in found.items() if len({len(each) for each in of_seeds}) > 1]:
        raise UserError(f"the seeds were not asked the same questions of {wrong[0]}; evaluate one of them again")
    return {task: np.stack(of_seeds) for task, of_seeds in found.items()}


def _has_each(record: Any) -> bool:
    return record is not None and all("each" in point for point in record["k"].values())
