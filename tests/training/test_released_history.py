"""The released code's pickles: their shapes, units and keys."""

import pytest

from expert_merging.training.released_history import as_released

TASKS = ("ag_news", "squad")
SCORES = {"ag_news": "accuracy", "squad": "exact_match"}


def history(tested: bool = False, **more):
    record = {"tasks": list(TASKS), "entropy": {"encoder": {"squad": [0.5]}, "decoder": {"squad": [0.25]}}}
    for number, task in enumerate(TASKS):
        epochs = [{SCORES[task]: 10.0 * number}, {SCORES[task]: 10.0 * number + 40}]
        record[f"{task}_data"] = {
            "main_score": SCORES[task], "validation": epochs, "test": {SCORES[task]: 99.0},
            "test_epochs": [{SCORES[task]: 5.0}, {SCORES[task]: 6.0}] if tested else [],
        }  # fmt: skip
    return record | more


USAGE = [
    {task: {"encoder": [[1, 3], [0, 0]], "decoder": [[2, 2], [4, 0]]} for task in TASKS},
    {task: {"encoder": [[4, 0], [1, 1]], "decoder": [[0, 4], [2, 2]]} for task in TASKS},
]
GOALS = {"validation": {"ag_news": 50.0, "squad": 20.0}, "test": {"ag_news": 60.0, "squad": 30.0}}
ALLOCATION = {"encoder": [[3, 5], [4, 4]], "decoder": [[2, 6], [4, 4]]}


def test_a_float_per_task_and_epoch():
    found = as_released(history(), USAGE, GOALS)
    assert found["ag_news_data"] == [0.0001, 0.4] and found["squad_data"] == [0.1, 0.5] and found["xsum_data"] == []
    assert found["scores_of"] == "validation" and "record_stay_num_experts_en" not in found
    tested = as_released(history(tested=True), USAGE, GOALS)
    assert tested["squad_data"] == [0.05, 0.06] and tested["scores_of"] == "test"


def test_a_grid_per_epoch_of_shares_over_all_tasks():
    found = as_released(history(), USAGE, None)
    assert found["expert_usage_grid"] == [[[0.25, 0.75], [0.0, 0.0]], [[1.0, 0.0], [0.5, 0.5]]]
    assert found["expert_usage_grid_de"] == [[[0.5, 0.5], [1.0, 0.0]], [[0.0, 1.0], [0.5, 0.5]]]
    assert found["entropy"] == {"squad": [0.5]} and found["entropy_de"] == {"squad": [0.25]}


@pytest.mark.parametrize(("tested", "first"), [(False, 0.2), (True, 0.3)])
def test_of_a_merged_model_the_single_task_scores_come_first(tested, first):
    """As the released script has them when it has loaded the single-task models; it divides by them."""
    found = as_released(history(tested, allocation=ALLOCATION), USAGE, GOALS)
    assert len(found["squad_data"]) == 3 and found["squad_data"][0] == first
    assert found["record_stay_num_experts_en"] == ALLOCATION["encoder"]
    assert found["record_stay_num_experts_de"] == ALLOCATION["decoder"]
