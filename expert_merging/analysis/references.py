"""Scores that need no fine-tuning, to read a table's other rows against (tools/reference_scores.py)."""

from collections import Counter
from typing import Any

from expert_merging.training import overall


def first_sentence(input_ids: list[int], tokenizer) -> str:
    """The lead of an input, after the prompt's first word: what summaries are commonly compared with."""
    text = tokenizer.decode(input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.partition(": ")[2].partition(". ")[0]


def most_common_answers(data: dict[str, Any]) -> dict[str, str]:
    """{task: the answer that most training examples have; of equally common ones the first in the alphabet}."""
    common = {}
    for task, features in data.items():
        answers = Counter(answers[0] for answers in features["train"]["references"])
        common[task] = min(answers, key=lambda answer: (-answers[answer], answer))
    return common


def constant_row(tasks: dict[str, Any], data: dict[str, Any], goals: dict, answers: dict[str, str]) -> dict[str, Any]:
    """Test scores, and Overall, of giving each task's one answer to every input."""
    written = {task: [answers[task]] * len(features["test"]) for task, features in data.items()}
    return _row(tasks, data, goals, written)


def lead_row(tasks: dict[str, Any], data: dict[str, Any], goals: dict, tokenizer) -> dict[str, Any]:
    """Test scores, and Overall, of giving the input's first sentence."""
    written = {
        task: [first_sentence(ids, tokenizer) for ids in features["test"]["input_ids"]]
        for task, features in data.items()
    }
    return _row(tasks, data, goals, written)


def _row(tasks: dict[str, Any], data: dict[str, Any], goals: dict, written: dict[str, list[str]]) -> dict[str, Any]:
    scores = {task: tasks[task].score(written[task], features["test"]["references"]) for task, features in data.items()}
    return {"test": scores, "overall": {"test": overall.overall(scores, goals["test"])}}
