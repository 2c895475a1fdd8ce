"""CAEM where the usage tells nothing: layers without tokens, tasks that use one expert only. Defined, and said."""

import json
import shutil
from types import SimpleNamespace

import pytest

from expert_merging.core.errors import UserError
from expert_merging.data import scores
from expert_merging.training import caem_sources

TASKS = ("ag_news", "squad", "xsum")
EVEN, ONE, NONE = [5, 5, 5, 5], [0, 9, 0, 0], [0, 0, 0, 0]


@pytest.fixture
def merged(world, tmp_path):
    """usage {task: [layer][expert], of both stacks} -> what merging three copies of a base into four experts records."""

    def merge(usage):
        c = SimpleNamespace(
            merging="caem", calibration="none", shares="entropy", pool_inputs=256, reading="paper", alpha=1.0,
            target_experts_num=4, scale="tiny", seed=0,
            SOURCE_MODEL_WEIGHT_PATH=str(tmp_path / "models"), SOURCE_PICKLE_PATH=str(tmp_path / "histories"),
        )  # fmt: skip
        (tmp_path / "histories").mkdir()
        for task in TASKS:
            shutil.copytree(world.folder / "base-4", tmp_path / "models" / f"single_task_{task}")
            grids = {key: {task: usage[task]} for key in ("expert_usage_grid", "expert_usage_grid_de")}
            history = {"identity": {"reading": "paper", "ancestor": "a"}, **grids}
            (tmp_path / "histories" / f"single_task_{task}.json").write_text(json.dumps(history))
        alone = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, print=print, device="cpu")
        return caem_sources.merge_sources(c, alone, caem_sources.open_sources(c, TASKS, 4, 4), tmp_path / "merged")

    return merge


def test_a_layer_without_tokens_is_said_and_gets_one_expert(merged):
    with pytest.warns(UserWarning, match="xsum: no validation token reached encoder sparse layer 2"):
        record = merged({"ag_news": [EVEN, EVEN], "squad": [EVEN, EVEN], "xsum": [EVEN, NONE]})
    assert record["allocation"]["encoder"][1] == [1, 2, 1]  # shares 2, 2, 0; one each at least, the first gives
    assert record["entropies"]["encoder"][2] == [1.0, 0.0]


def test_no_entropy_in_any_task_is_said_and_shared_evenly(merged):
    with pytest.warns(UserWarning, match="decoder sparse layer 1: every task uses one expert only .* shared evenly"):
        record = merged({task: [ONE, EVEN] for task in TASKS})
    assert record["allocation"]["decoder"] == [[2, 1, 1], [2, 1, 1]]  # 4/3 each, the odd one to the first
    assert all(chosen[0] == 1 for chosen in record["experts"]["decoder"][0])  # the one in use comes along


def test_no_token_at_all_is_refused(merged):
    with pytest.raises(UserError, match="or of no token; .* train that model again"):
        merged({"ag_news": [EVEN, EVEN], "squad": [NONE, NONE], "xsum": [EVEN, EVEN]})


@pytest.mark.parametrize("answer", ["", "the", "a " * 500, "\N{ZERO WIDTH SPACE}"])
def test_a_constant_prediction_is_scored(answer):
    references = [["the river"], ["river", "a river"], ["x"]]
    for score in (scores.accuracy, scores.squad, scores.rouge):
        assert all(0 <= value <= 100 for value in score([answer] * 3, references).values())
