"""Scores that need no fine-tuning, to read a table's other rows against (tools/reference_scores.py)."""

import re
from collections import Counter
from typing import Any

from expert_merging.data.scores import pack
from expert_merging.training import overall

_AT_ONCE = 256  # test inputs that are compared with all training inputs together

Answers = dict[str, list[str]]  # task: what is given to each test input


def most_common_answers(data: dict[str, Any]) -> dict[str, str]:
    """{task: the answer that most training examples have; of equally common ones the first in the alphabet}."""
    common = {}
    for task, features in data.items():
        answers = Counter(answers[0] for answers in features["train"]["references"])
        common[task] = min(answers, key=lambda answer: (-answers[answer], answer))
    return common


def trivial_answers(data: dict[str, Any], tokenizer) -> dict[str, Answers]:
    """What can be answered without having understood anything: {how: answers}."""
    common = most_common_answers(data)
    inputs = {
        task: {split: _texts(features[split]["input_ids"], tokenizer) for split in ("train", "test")}
        for task, features in data.items()
    }
    return {
        "most common training answer": {task: [common[task]] * len(texts["test"]) for task, texts in inputs.items()},
        "first sentence of the input": {
            task: list(map(first_sentence, texts["test"])) for task, texts in inputs.items()
        },
        "words after the question's last word": {
            task: list(map(words_after, texts["test"])) for task, texts in inputs.items()
        },
        "answer of the nearest training example": {
            task: nearest(texts["train"], [answers[0] for answers in data[task]["train"]["references"]], texts["test"])
            for task, texts in inputs.items()
        },
    }


def first_sentence(text: str) -> str:
    """The lead of an input, after the prompt's first word: what summaries are commonly compared with."""
    return text.partition(": ")[2].partition(". ")[0].strip()


def words_after(text: str) -> str:
    """Where the input is a question and its context: what follows the question's last word there, up to a comma, a full
    stop or a bracket; else nothing."""
    asked = re.match(r"Question: .*?(\w+)\W*? Context: (.*)", text, re.DOTALL)
    found = asked and re.search(rf"\b{re.escape(asked[1])}\b[\s:({{]*([^,.(){{}}\n]*)", asked[2])
    return found[1].strip() if found else ""


def nearest(train: list[str], answers: list[str], test: list[str]) -> list[str]:
    """For each test input the answer of the training input whose words, weighted by TF-IDF, have the largest cosine with
    its own."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(sublinear_tf=True)
    known = words.fit_transform(train)
    asked = words.transform(test)
    closest: list[int] = []
    for start in range(0, len(test), _AT_ONCE):  # all at once would be test examples times training examples
        closest += (asked[start : start + _AT_ONCE] @ known.T).toarray().argmax(1).tolist()
    return [answers[i] for i in closest]


def row(tasks: dict[str, Any], data: dict[str, Any], goals: dict, answers: Answers) -> dict[str, Any]:
    """Test scores of these answers, and Overall."""
    scores, each = {}, {}
    for task, features in data.items():
        wanted = features["test"]["references"]
        scores[task] = tasks[task].score(answers[task], wanted)
        each[task] = pack(tasks[task].score_each(answers[task], wanted))
    return {"test": scores, "test_each": each, "overall": {"test": overall.overall(scores, goals["test"])}}


def _texts(rows: list[list[int]], tokenizer) -> list[str]:
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
