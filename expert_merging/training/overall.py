"""Overall, the paper's score over tasks (4.1), what it divides by, and scores in words."""

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np

from expert_merging.core.errors import UserError
from expert_merging.data.features import noted_sha256
from expert_merging.data.tasks import get_task
from expert_merging.run import results
from expert_merging.run.constants import command
from expert_merging.run.deviations import deviates

SCORED_WITH = (
    "max_input_length", "max_decoder_length", "validation_examples", "test_examples", "num_beams", "repetition_penalty",
    "no_repeat_ngram_size", "length_penalty", "precision",
)  # fmt: skip


def selection_split(reading: str) -> str:
    """The split by which the best epoch is chosen. The released code looks at the test scores; the paper does not."""
    return "test" if deviates(reading, "selection") else "validation"


def overall(scores: dict[str, dict[str, float]], goals: dict[str, float] | None) -> float:
    """Mean over tasks of score / the single-task model's score (paper, 4.1); without goals the mean score itself.

    A task whose single-task model scores 0 cannot be compared and is left out; with none left the result is 0.
    """
    main = {task: one[get_task(task).main_score] for task, one in scores.items()}
    if goals is None:
        return float(np.mean(list(main.values())))
    ratios = [main[task] / goals[task] for task in main if goals[task] > 0]
    return float(np.mean(ratios)) if ratios else 0.0


def single_task_goals(folder: str, tasks: list[str], experts: int, c: SimpleNamespace) -> dict[str, dict[str, float]]:
    """What Overall divides by: validation and test scores of the single-task models with `experts` experts.

    Raises UserError, naming the command to run, where one has not been trained, or was scored on other data or otherwise.
    """
    goals: dict[str, dict[str, float]] = {"validation": {}, "test": {}}
    for task in tasks:
        history = single_task_history(folder, task, experts, c)
        noted = results.made_with(history)
        again = f"remove {_place(folder, task)} and run: {_training(c, task, experts)}"
        asked = results.identity(c, [name for name in SCORED_WITH if name != "precision"])
        results.refuse(_place(folder, task), *results.shared(noted, asked), f"restore them, or {again}")
        if "data" in noted and noted["data"].get(task) != noted_sha256(task, c):
            raise UserError(
                f"single-task {task} was scored on other data than {c.DATA_DIR}/{task}; bring those, or {again}"
            )
        score, best = get_task(task).main_score, history["best_epoch"] - 1
        goals["validation"][task] = history[f"{task}_data"]["validation"][best][score]
        goals["test"][task] = history[f"{task}_data"]["test"][score]
    for split, of_split in goals.items():
        if zero := [task for task, value in of_split.items() if value == 0]:
            warnings.warn(f"Overall on {split} leaves out {', '.join(zero)}: the single-task score is 0", stacklevel=2)
    return goals


def single_task_history(folder: str, task: str, experts: int, c: SimpleNamespace) -> dict[str, Any]:
    """The history that `single_task_finetune.py` left for `task`."""
    return results.load(_place(folder, task), lambda: _training(c, task, experts))


def _place(folder: str, task: str) -> str:
    return f"{folder}/single_task_{task}.json"


def _training(c: SimpleNamespace, task: str, experts: int) -> str:
    return command("single_task_finetune.py", c, task_type=task, num_expert=experts)


def scores_line(test: dict[str, dict[str, float]], value: float | None) -> str:
    """Test scores in one line."""
    scores = "  ".join(f"{task}: " + " ".join(f"{k} {v:.2f}" for k, v in one.items()) for task, one in test.items())
    return scores + (f"  Overall {value:.4f}" if value is not None else "")


def summary(history: dict[str, Any]) -> str:
    """What a finished run found, in a few lines."""
    test = {task: history[f"{task}_data"]["test"] for task in history["tasks"]}
    lines = [
        f"{history['name']}: best epoch {history['best_epoch']} of {len(history['selection'])}, {history['seconds']:.0f} s",
        "test  " + scores_line(test, history.get("overall", {}).get("test")),
    ]
    for stack, of_tasks in history["entropy"].items():
        for task, entropies in of_tasks.items():
            lines.append(f"expert-usage entropy, {stack}, {task}: " + " ".join(f"{value:.3f}" for value in entropies))
    return "\n".join(lines)
