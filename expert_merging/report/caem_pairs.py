"""Tables of pairs of models: soups (tables 4 and 5) and the similarity of hidden states (figures 2 and 4)."""

from statistics import fmean
from typing import Any

from expert_merging.report.evidence import Evidence, kept_share
from expert_merging.report.tables import Table, stat

PAPER_SOUPS = {
    "CAEM-8 + Baseline-8": 0.8531, "CAEM-8 + CAEM-8-Avg": 0.8880, "CAEM-8-Avg + Baseline-8": 0.8592,
    "CAEM-16 + Baseline-16": 0.9035, "CAEM-16 + CAEM-16-Avg": 0.9337, "CAEM-16-Avg + Baseline-16": 0.8678,
    "CAEM-8-to-16 + Baseline-16": 0.0, "CAEM-8-to-16 + CAEM-16": 0.0011, "CAEM-8-to-16 + CAEM-16-Avg": 0.0010,
}  # fmt: skip


def soups(e: Evidence) -> Table:
    """Tables 4 and 5."""
    table = Table(
        "soups", "Soups of two models (tables 4 and 5)",
        "Overall of the equal average of two fine-tuned models, not trained further; what is kept of its parents' mean "
        "Overall; and the barrier: how far the loss on the line between them rises above the straight line, in nats a "
        "target token on validation, at its highest.",
    )  # fmt: skip
    for pair in e.pairs():
        if found := [(soup, a, b) for soup, a, b in e.get(pair, *pair.split(" + ")) if "soup" in soup]:
            row: dict[str, Any] = {"pair": pair, "Overall": stat([s["soup"]["overall"] for s, _, _ in found], 4)}
            for task in e.tasks:
                row[task] = stat([s["soup"]["test"][task][e.main_score(task)] for s, _, _ in found])
            row["kept"] = stat([kept_share(*one) for one in found], 3)
            row["barrier"] = stat([s["line"]["barrier"] for s, _, _ in found if "line" in s], 3)
            if e.scale == "paper":
                row["paper: Overall"] = PAPER_SOUPS.get(pair)
            table.rows.append(row | {"from": e.source(pair)})
    return table


def similarity(e: Evidence) -> Table:
    """Figures 2 and 4 in numbers."""
    table = Table(
        "similarity", "Linear CKA between two models (figures 2 and 4)",
        "Mean over tasks and layers, and the lowest of them, before and after the joint fine-tuning; 1 is the same up to "
        "rotation and scale.",
    )  # fmt: skip
    for pair in e.pairs():
        found = [one["cka"] for (one,) in e.get(pair) if "cka" in one]
        for stack in e.stacks if found else ():
            row: dict[str, Any] = {"pair": pair, "stack": stack}
            for when in ("before", "after"):
                values = [[v for task in e.tasks for v in one[when][task][stack]] for one in found]
                row |= {when: stat([fmean(v) for v in values], 4), f"lowest {when}": stat([min(v) for v in values], 4)}
            table.rows.append(row | {"from": e.source(pair)})
    return table
