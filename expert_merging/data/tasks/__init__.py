"""What a task is: one module a task, named as in `task_types`; a new task is a new file in this folder.

A task module has
    main_score: str                               the key of `score`'s result that selects models and enters Overall
    load(constants) -> {"train", "validation", "test"}      raw examples of each split
    prompt(example) -> str                        the model's input
    target(example) -> str                        what it learns to write
    references(example) -> list[str]              what its output is compared with
    score(predictions, references) -> dict[str, float]      0..100
    score_each(predictions, references) -> list[float]      the main score of each example, 0..100
    split: str                                    how validation is drawn, where `load` draws it; features note it
"""

import importlib
from pathlib import Path
from types import ModuleType

from expert_merging.core.errors import UserError

PARTS = ("main_score", "load", "prompt", "target", "references", "score", "score_each")


def task_names() -> list[str]:
    """The names of all tasks, sorted."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_"))


def get_task(name: str) -> ModuleType:
    """The module of a task. Raises UserError for a name that no task has, and a module that lacks something."""
    if name not in task_names():
        raise UserError(f"there is no task {name!r}; there are: {', '.join(task_names())}")
    task = importlib.import_module(f"{__name__}.{name}")
    if missing := [part for part in PARTS if not hasattr(task, part)]:
        raise UserError(f"the task {name} lacks {missing[0]}; data/tasks/__init__.py says what a task has")
    return task
