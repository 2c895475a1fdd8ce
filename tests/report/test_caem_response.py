"""The allocation response from made-up records."""

import pytest
from PIL import Image

from expert_merging.report import caem_response, figures
from expert_merging.report.evidence import Evidence

TASKS = ("topic", "qa")
SHARES = {"": (3, 3), "-Avg": (3, 3), "-inverse": (2, 4), "-topic": (5, 1), "-qa": (1, 5)}


def made(per_expert=2.0, shares=SHARES):
    found = {}
    for seed in (0, 1):
        found[seed] = {}
        for case, counts in shares.items():
            scores = {task: {"accuracy": 40 + seed + per_expert * n} for task, n in zip(TASKS, counts, strict=True)}
            halved = {task: {"accuracy": score["accuracy"] / 2} for task, score in scores.items()}
            found[seed][f"CAEM-6{case}"] = {
                "allocation": {stack: [list(counts), list(counts)] for stack in ("encoder", "decoder")},
                "before": {"test": halved, "overall": {"test": 0.4}}, "overall": {"test": 0.9},
                **{f"{task}_data": {"main_score": "accuracy", "test": scores[task]} for task in TASKS},
            }  # fmt: skip
    return Evidence("night", 6, 12, TASKS, found)


def test_slopes_are_points_an_expert():
    for task in TASKS:
        assert caem_response.slopes(made(2.0), task, True) == pytest.approx([2.0, 2.0])
        assert caem_response.slopes(made(-1.0), task, False) == pytest.approx([-0.5, -0.5])


def test_a_row_for_each_share_two_of_slopes_and_one_of_ranges():
    rows = caem_response.response(made()).rows
    assert [row["shares"] for row in rows] == [
        "by entropy (CAEM)", "evenly", "by inverse entropy", "all but the least to topic", "all but the least to qa",
        "points an expert, before fine-tuning", "points an expert, after fine-tuning", "range over the shares",
    ]  # fmt: skip
    assert rows[3]["experts"] == "5.0, 1.0" and str(rows[3]["topic"]).startswith("50.50")
    assert rows[-2]["qa"].startswith("+2.00")
    assert str(rows[-1]["Overall"]).startswith("0.0000") and str(rows[-1]["topic"]).startswith("8.00")  # 2 (5 - 1)


def test_the_range_is_of_each_seed_by_itself():
    e = made()
    for seed, values in ((0, (0.5, 0.8, 0.6, 0.7, 0.9)), (1, (0.9, 1.0, 0.95, 0.92, 0.91))):
        for case, overall in zip(SHARES, values, strict=True):
            e.records[seed][f"CAEM-6{case}"]["overall"]["test"] = overall
    assert caem_response.ranges(e, "overall", "test") == pytest.approx([0.4, 0.1])


def test_without_other_shares_there_is_no_table():
    assert caem_response.response(made(shares={"": (3, 3), "-Avg": (3, 3)})).rows == []


def test_the_figure_has_a_panel_a_task_and_time(tmp_path):
    panels = {
        f"{task}, {when}": caem_response.points(made(), task, when == "after")
        for when in ("before", "after")
        for task in TASKS
    }
    figures.response(panels, tmp_path / "response.png")
    assert Image.open(tmp_path / "response.png").size[0] > 600
