"""The table of calibrated routers from made-up records with a score for each example."""

import numpy as np
import pytest

from expert_merging.data.scores import pack
from expert_merging.report.caem_calibration import calibration
from expert_merging.report.evidence import Evidence

TASKS = ("topic", "qa")
NEAR = {"one": {"agreement": [0.2, 0.5]}, "two": {"agreement": [0.4, 0.9]}}


def each(share, examples=200):
    """So many of a hundred are right, the same examples for all."""
    return pack(np.where(np.arange(examples) % 100 < round(100 * share), 100.0, 0.0))


def record(share, merged):
    of_tasks = {f"{task}_data": {"main_score": "accuracy", "test_each": each(share)} for task in TASKS}
    before = {"test_each": {task: each(merged) for task in TASKS}, "overall": {"test": merged / 0.8}}
    return {"tasks": list(TASKS), "overall": {"test": share / 0.8}, "before": before, "calibration": NEAR, **of_tasks}


def made(seeds=3, **runs):
    runs = {"CAEM_4": (0.6, 0.1), "CAEM_4_calibrated": (0.62, 0.3), **runs}
    found = {}
    for seed in range(seeds):
        found[seed] = {f"single-task-4 {t}": {"tasks": [t], f"{t}_data": {"test_each": each(0.8)}} for t in TASKS}
        found[seed] |= {
            name.replace("_", "-"): record(*(one + seed / 100 for one in pair)) for name, pair in runs.items()
        }
    return Evidence("night", 4, 6, TASKS, found)


def test_a_row_before_and_one_after_fine_tuning():
    merged, tuned = calibration(made()).rows
    assert (merged["merge"], merged["when"], tuned["when"], merged["seeds"]) == (
        "CAEM-4",
        "merged only",
        "fine-tuned",
        3,
    )
    assert str(merged["as merged"]).startswith("0.1375") and str(merged["calibrated"]).startswith("0.3875")
    assert merged["Overall, added"].startswith("+0.2500 [") and tuned["Overall, added"].startswith("+0.0250 [")
    assert merged["topic, added"].startswith("+20.00 [") and tuned["qa, added"].startswith("+2.00 [")
    assert merged["agreement"] == "0.30 to 0.70" and merged["verdict"] == "above"
    assert merged["from"] == "seed{0,1,2}.json: CAEM-4; CAEM-4-calibrated"


def test_the_average_is_judged_apart_and_one_seed_tells_nothing():
    more = {"Average_4": (0.6, 0.3), "Average_4_calibrated": (0.5, 0.1)}
    rows = {(row["merge"], row["when"]): row for row in calibration(made(**more)).rows}
    assert len(rows) == 4 and rows["Average-4", "merged only"]["verdict"] == "below"
    assert rows["CAEM-4", "merged only"]["verdict"] == "above"
    alone = calibration(made(1)).rows[0]
    assert alone["Overall, added"] == "+0.2500" and alone["verdict"] == "cannot tell: one seed"


@pytest.mark.parametrize("lacking", ["CAEM-4", "CAEM-4-calibrated"])
def test_without_both_runs_or_scores_of_examples_there_is_no_table(lacking):
    e = made()
    for of_seed in e.records.values():
        del of_seed[lacking]["before"]["test_each"], of_seed[lacking]["topic_data"]["test_each"]
    assert calibration(e).rows == []
    for of_seed in e.records.values():
        del of_seed[lacking]
    assert calibration(e).rows == []
