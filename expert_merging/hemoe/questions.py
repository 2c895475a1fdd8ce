"""Multiple-choice questions in a folder, for lm_eval: {task}/test.jsonl, lines {"question", "choices", "answer" (index)}.

A question with a `_` is one of WinoGrande's kind: the choices go where the blank is, and what follows it is scored.
"""

import random
from pathlib import Path
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json, write_json, write_json_lines
from expert_merging.data.raw_files import read_jsonl

# As lm_eval's own tasks of these names put the question; others like ARC's.
PROMPTS = {"openbookqa": "{}", "social_iqa": "Q: {}\nA:", "siqa": "Q: {}\nA:"}
NOT_NORMED = ("social_iqa", "siqa")  # which lm_eval scores by the likelihood alone
PROMPT = "Question: {}\nAnswer:"
SAMPLE_SEED = 0  # of which rows are taken: the same for every model, seed and machine


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """{task: its questions}, sorted by task. Raises UserError, by file and line, for what is no question."""
    if not folder.is_dir():
        raise UserError(f"QUESTIONS_PATH: there is no folder {folder}; it holds a folder TASK with test.jsonl a task")
    files = sorted(folder.glob("*/test.jsonl"))
    if not files:
        raise UserError(f"QUESTIONS_PATH: {folder} holds no TASK/test.jsonl")
    found = {}
    for path in files:
        if not path.read_bytes().strip():
            raise UserError(f"{path} holds no questions")
        found[path.parent.name] = [_question(f"{path}, {where}", row) for where, row in read_jsonl(path)]
    return found


def _question(where: str, row: dict[str, Any] | str) -> dict[str, Any]:
    if said := complaint(row):
        raise UserError(f"{where}: {said}")
    assert not isinstance(row, str)  # which is a complaint
    return row


def complaint(row: dict[str, Any] | str) -> str | None:
    """What is wrong with a question, if anything."""
    if isinstance(row, str) or not {"question", "choices", "answer"} <= row.keys():
        return 'not a JSON object with "question", "choices" and "answer"'
    question, choices, answer = row["question"], row["choices"], row["answer"]
    texts = [question, *choices] if isinstance(choices, list) else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return "the question and each of its choices must be a text that is not empty"
    if len(choices) < 2:
        return f"a question with {len(choices)} choice; two are the least"
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        return f"answer is {answer!r}; of {len(choices)} choices it is 0 to {len(choices) - 1}"
    return None


def write(found: dict[str, list[dict[str, Any]]], folder: Path, most: int) -> None:
    """Write `folder`/{task}.yaml and .jsonl of at most `most` questions a task (0: all), a fixed sample.

    Raises UserError where the folder holds other tasks, which would be asked too.
    """
    if others := sorted({path.stem for path in folder.glob("*.yaml")} - found.keys()):
        raise UserError(f"{folder} holds the task {others[0]}, which QUESTIONS_PATH has not; remove that folder first")
    for task, rows in found.items():
        rows = [rows[number] for number in sample(task, len(rows), most)]
        blank = all("_" in row["question"] for row in rows)
        # lm_eval takes a whole number in doc_to_text for the place of the right context among several.
        fields = {"doc_to_text": "answer", "doc_to_choice": "contexts", "doc_to_target": "rest"}
        if not blank:
            fields = {"doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "answer"}
        asked = [_with_blank(row) if blank else _with_prompt(row, PROMPTS.get(task, PROMPT)) for row in rows]
        write_task(folder, task, asked, fields, ("acc",) if blank or task in NOT_NORMED else ("acc", "acc_norm"))


def sample(task: str, count: int, most: int) -> list[int]:
    """At most `most` (0: all) of `count` rows of a task, ascending; always the same."""
    if not 0 < most < count:
        return list(range(count))
    return sorted(random.Random(f"{SAMPLE_SEED} {task}").sample(range(count), most))


def write_task(
    folder: Path, task: str, rows: list[dict[str, Any]], fields: dict[str, str], metrics: tuple[str, ...]
) -> None:
    """Write a task of lm_eval, 0-shot multiple choice: `folder`/{task}.jsonl with its rows and {task}.yaml, which names it.

    Args:
        fields: which field of a row is doc_to_text, doc_to_choice and doc_to_target.
    """
    path = (folder / f"{task}.jsonl").absolute()
    write_json_lines(path, rows)
    write_json(  # JSON is YAML
        folder / f"{task}.yaml",
        {
            "task": task, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test", "output_type": "multiple_choice", **fields, "num_fewshot": 0,
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
            "metadata": {"version": 1.0},
        },
    )  # fmt: skip


def check_place(folder: Path, task: str) -> None:
    """Raises UserError where `folder`/{task}.yaml is one of `write_task`'s that was copied from elsewhere: lm_eval wants the
    whole path of the questions, and would read those there."""
    try:
        noted = Path(read_json(folder / f"{task}.yaml")["dataset_kwargs"]["data_files"]["test"])
    except (UserError, OSError, KeyError, TypeError):  # not there, or not one of ours
        return
    here = (folder / noted.name).absolute()
    if noted != here and here.exists():
        raise UserError(
            f"{folder / task}.yaml names the questions in {noted.parent}; remove {folder}, make it here again"
        )


def write_doc_choice(found: dict[str, dict[str, list[dict]]], train_folder: Path, tasks_folder: Path) -> None:
    """Write `train_folder`/{task}.jsonl, and for lm_eval `tasks_folder`/{task}.yaml and .jsonl, of what
    `data.doc_choice.examples` gives."""
    fields = {"doc_to_text": "instruction", "doc_to_choice": "choices", "doc_to_target": "label"}
    for task, splits in found.items():
        write_json_lines(train_folder / f"{task}.jsonl", splits["train"])
        write_task(tasks_folder, f"doc_{task}", splits["test"], fields, ("acc", "acc_norm"))


def _with_prompt(row: dict[str, Any], prompt: str) -> dict[str, Any]:
    return {"prompt": prompt.format(row["question"]), "choices": row["choices"], "answer": row["answer"]}


def _with_blank(row: dict[str, Any]) -> dict[str, Any]:
    before, _, after = row["question"].partition("_")
    return {"contexts": [before + choice for choice in row["choices"]], "rest": after.strip(), "answer": row["answer"]}
