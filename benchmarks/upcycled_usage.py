"""Does it matter for usage entropy what an upcycled model's experts were at the start?

    python benchmarks/upcycled_usage.py "copies=runs/real/seed0/histories/single_task_[8]" "parts=OTHER/single_task_[8]"

Each word names a base and the folder with the histories of its single-task models (single_task_finetune.py). A row a base:
scores, each task's mean entropy, how far the tasks' entropies lie apart in a layer, how far their use of experts does (half the
sum of |p - q| over experts, mean over layers and pairs of tasks), and in how many layers shares by entropy are other than even
ones. Writes benchmarks/results/upcycled_usage.json and .md.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import machine
import numpy as np
from transformers.models.switch_transformers.caem import allocate_experts

from expert_merging.core.files import read_json, write_atomic, write_json
from expert_merging.report.publish import without_places
from expert_merging.report.tables import Table

NOTE = (
    "Single-task models of each base, usage on validation. Entropy: mean over layers. Apart: the largest entropy of a task "
    "less the smallest, mean over layers. Use apart: total variation between two tasks' shares of experts, mean over layers "
    "and pairs; 0 the same, 1 no expert in common. Not even: layers in which entropy (alpha 1) gives the tasks other numbers "
    "of experts than an even share does, in whatever order. The last three want several tasks."
)


def row(base: str, histories: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"base": base}
    usage, entropies = [], []
    for history in histories:
        (task,) = history["tasks"]
        scores = history[f"{task}_data"]
        found[f"{task} {scores['main_score']}"] = f"{scores['test'][scores['main_score']]:.1f}"
        usage.append(np.array(history["usage"]["decoder"][task], dtype=float))
        entropies.append(history["entropy"]["decoder"][task])
    for history, of_task in zip(histories, entropies, strict=True):
        found[f"{history['tasks'][0]} entropy"] = f"{np.mean(of_task):.3f}"
    if len(histories) == 1:  # nothing to be apart from
        return found
    shares = [counts / counts.sum(axis=1, keepdims=True) for counts in usage]
    apart = [np.abs(one - other).sum(axis=1).mean() / 2 for one, other in itertools.combinations(shares, 2)]
    experts, layers = shares[0].shape[1], list(zip(*entropies, strict=True))
    even = sorted(allocate_experts([1.0] * len(usage), experts, experts))
    uneven = [layer for layer in layers if sorted(allocate_experts(layer, experts, experts)) != even]
    found |= {
        "apart": f"{np.mean(np.ptp(entropies, axis=0)):.3f}", "use apart": f"{np.mean(apart):.3f}",
        "not even": f"{len(uneven)} of {len(layers)}",
    }  # fmt: skip
    return found


def main() -> None:
    bases = dict(word.split("=", 1) for word in sys.argv[1:])
    if not bases:
        sys.exit(__doc__)
    records = {
        base: [read_json(path) for path in sorted(Path(folder).glob("single_task_*.json"))]
        for base, folder in bases.items()
    }
    table = Table("upcycled_usage", "Use of experts that began alike and apart", NOTE)
    rows = [row(base, histories) for base, histories in records.items()]
    names = list(dict.fromkeys(name for one in rows for name in one))  # a base may lack a task
    table.rows = [{name: one.get(name, "") for name in names} for one in rows]
    kept = ("versions", "identity", "tasks", "usage", "entropy")
    noted = {
        base: [
            {name: history[name] for name in kept}
            | {"command": without_places(history["command"])}
            | {split: history[f"{history['tasks'][0]}_data"][split] for split in ("validation", "test")}
            for history in histories
        ]
        for base, histories in records.items()
    }
    write_json(machine.RESULTS / "upcycled_usage.json", noted)
    write_atomic(machine.RESULTS / "upcycled_usage.md", table.markdown())
    print(table.markdown())


if __name__ == "__main__":
    main()
