"""The registry: its rows fit the functions, and one row is all that a method costs."""

import inspect
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from expert_merging.merging.registry import FROM_WEIGHTS, METHODS


@pytest.mark.parametrize("method", [method for method in METHODS.values() if method.function], ids=lambda m: m.name)
def test_settings_are_arguments_and_defaults_the_functions(method):
    parameters = inspect.signature(method.load()).parameters
    assert list(parameters)[:2] == ["base", "models"] and {*method.settings} <= {*parameters}
    wanted = [name for name, p in parameters.items() if p.default is p.empty][2:]
    assert wanted == ([method.statistics] if method.statistics else [])


def test_a_row_is_either_a_function_or_adapts():
    for name, method in METHODS.items():
        assert name == method.name and bool(method.function) != bool(method.adapts)
        assert method.adapts in ("", "coefficients", "routers") and bool(method.sees) == (name not in FROM_WEIGHTS)


def test_arguments_are_the_constants_values():
    assert METHODS["dare_ties"].arguments({"ties_lam": 0.9, "dare_drop": 0.4, "seed": 3, "ties_keep": 0.1}) == {
        "scale": 0.9, "drop": 0.4, "seed": 3, "keep": 0.1,
    }  # fmt: skip
    assert METHODS["ties_sum"].arguments({"lam": 0.3, "ties_keep": 0.2})["merge"] == "sum"


ADDED = """
from expert_merging.merging.registry import FROM_WEIGHTS, METHODS, Constant, Method
METHODS["half"] = FROM_WEIGHTS["half"] = Method(
    "half", "Half", "task_arithmetic.task_arithmetic", {"scale": Constant("half_lam", 0.5, "a half")}
)

from expert_merging.experiment import grid
from expert_merging.run.constants import read_constants
from expert_merging.wemoe import classification, report
from neighbours import WEMoE_clip, WEMoE_digits, WEMoE_multi_task_merging, WEMoE_text

for script in (WEMoE_clip, WEMoE_digits, WEMoE_multi_task_merging, WEMoE_text):
    assert read_constants(vars(script), ["--half_lam", "0.7"]).half_lam == 0.7
assert "half" in WEMoE_multi_task_merging.methods and "half" in WEMoE_text.methods
classification.check_method("half")
c = read_constants({"__file__": grid.__file__, "experts_num": 4, "larger_experts_num": 6}, [])
assert "merging-4 half" in grid.grid(c).steps
assert list(report.read("runs")) == ["average", "half", "wemoe"]
"""


def test_a_row_is_all_that_a_method_costs(tmp_path):
    """It is in the scripts' constants, in the grid of runs, in the image experiments and in the order of their tables."""
    for method in ("wemoe", "half", "average"):
        path = tmp_path / "runs" / "records" / "seed0" / f"{method}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"average_accuracy": 0.5}')
    result = subprocess.run([sys.executable, "-c", ADDED], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
