"""Tables of the audit: what the released code's deviations from the paper change."""

from statistics import fmean
from typing import Any

from expert_merging.report import claims
from expert_merging.report.evidence import Evidence, mean_loss
from expert_merging.report.tables import Table, stat


def deviations(e: Evidence) -> Table:
    """The audit: CAEM as the authors' code does it, one deviation at a time."""
    paper = f"CAEM-{e.n}"
    table = Table(
        "deviations", f"The released code's deviations, one at a time ({paper})",
        "Layers (encoder and decoder) whose allocation differs from the paper's reading; loss and Overall of the merged "
        "model before the joint fine-tuning, and Overall after it; differences within each seed.",
    )  # fmt: skip
    for label, name in (("paper", paper), ("counts", f"{paper}-counts"), ("projection", f"{paper}-projection")):
        found = e.get(paper, name)
        if found and (name != paper or e.get(f"{paper}-counts") or e.get(f"{paper}-projection")):
            row: dict[str, Any] = {"deviation": label}
            row["layers allocated otherwise"] = stat([_allocated_otherwise(a, b) for a, b in found], 1)
            row["merged: loss"] = stat([mean_loss(b["before"]["validation"], e) for _, b in found], 3)
            row["merged: Overall"] = stat([b["before"]["overall"]["test"] for _, b in found], 4)
            row["Overall"] = stat([b["overall"]["test"] for _, b in found], 4)
            difference = [b["overall"]["test"] - a["overall"]["test"] for a, b in found]
            row["minus paper"] = "" if name == paper else claims.shown(difference)
            table.rows.append(row | {"from": e.source(name)})
    return table


def best_on_test(e: Evidence) -> Table:
    """What choosing the best epoch by the test scores adds to what is reported."""
    table = Table(
        "best_on_test", "The best epoch chosen on test, as the released code does",
        "Overall on test of the same runs, the epoch chosen by validation or by test.",
    )  # fmt: skip
    for name in e.multi_task():
        found = [(one, _overall_by_epoch(e, one, seed)) for seed, one in e.by_seed(name)]
        found = [(one, values) for one, values in found if values]
        if found:
            by_test = [max(values) for _, values in found]
            by_validation = [one["overall"]["test"] for one, _ in found]
            row: dict[str, Any] = {"configuration": name, "by validation": stat(by_validation, 4)}
            row |= {"by test": stat(by_test, 4)}
            row["gain"] = stat([a - b for a, b in zip(by_test, by_validation, strict=True)], 4)
            table.rows.append(row | {"from": e.source(name)})
    return table


def _allocated_otherwise(a: Any, b: Any) -> int:
    first, second = a["allocation"], b["allocation"]
    return sum(x != y for stack in first for x, y in zip(first[stack], second[stack], strict=True))


def _overall_by_epoch(e: Evidence, record: Any, seed: int) -> list[float]:
    """Overall on test after each epoch, where it was noted."""
    experts = record["experts_num"]
    ratios = []
    for task in e.tasks:
        goal = e.records[seed].get(f"single-task-{experts} {task}")
        main = e.main_score(task)
        if goal is None or not record[f"{task}_data"].get("test_epochs"):
            return []
        if (best := goal[f"{task}_data"]["test"][main]) > 0:
            ratios.append([scores[main] / best for scores in record[f"{task}_data"]["test_epochs"]])
    return [fmean(one) for one in zip(*ratios, strict=True)]
