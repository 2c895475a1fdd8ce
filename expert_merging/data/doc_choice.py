"""Six multiple-choice tasks made of docstrings, the offline stand-in for ARC, PIQA and the others.

An example is {"instruction", "output", "task"}; one for evaluation has "choices" too, the output among them at "label".
What is asked of a model is the same as there: which choice is the likeliest to follow the instruction.

topic    the library that a passage is about (names that tell are masked)
type     the type of a parameter, from its name and description
default  the default of a parameter, from the same
summary  the first line of a docstring, from the name and the parameters of a function
next     the end of a sentence, from its beginning
order    the sentence with its words in the right order
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from expert_merging.data import docstring_splits
from expert_merging.data.docstring_reader import Docstring
from expert_merging.data.docstring_splits import Candidate
from expert_merging.data.tasks import doc_qa, doc_summary, doc_topic

CHOICES = 4  # but for `topic`, which has a choice a library
COMMON = 30  # of how many common types, and defaults, the wrong ones are
PASSAGE = 24  # words of a passage
DESCRIPTION = 16  # words of a parameter's description
SENTENCE = range(12, 25)  # words of a sentence that is cut in two
ORDERED = range(6, 13)  # words of a sentence that is shuffled


def examples(docs: Iterable[Docstring], train: int, test: int, validation: int = 1) -> dict[str, dict[str, list[dict]]]:
    """{task: {"train": examples, "validation": examples, "test": examples with choices}}, at most so many; the same each time.

    Splits are by source file, and no test example stands in training text (docstrings.split_examples).
    """
    docs = list(docs)
    sizes = {"train": train, "validation": validation, "test": test}
    result = {}
    for task, (candidates, most_common, wrong) in _TASKS.items():
        found = docstring_splits.split_examples(docs, candidates(docs), sizes, most_common)
        answers = [answer for answer, _ in Counter(e["output"] for e in found["train"]).most_common(COMMON)]
        rng = random.Random(f"{docstring_splits.DATA_SEED} {task}")
        for one in (one for split in found.values() for one in split):
            one["task"] = task
        for one in found["test"]:
            others = wrong(one, answers, found["test"], rng)
            one["choices"] = [one["output"], *others]
            rng.shuffle(one["choices"])
            one["label"] = one["choices"].index(one["output"])
        result[task] = found
    return result


# ---------------------------------------------------------------- the tasks: their examples, then the wrong choices


def _topics(docs: list[Docstring]) -> Iterator[Candidate]:
    for doc in docs:
        for text in list(doc_topic.passages(doc))[:1] if doc.package in doc_topic.LABELS else ():
            shown = " ".join(doc_topic.masked(text).split()[:PASSAGE])
            yield _candidate(doc, f"{shown} Library:", doc_topic.LABELS[doc.package], text)


def _parameters(what: str) -> Callable[[list[Docstring]], Iterator[Candidate]]:
    def candidates(docs: list[Docstring]) -> Iterator[Candidate]:
        for doc in docs:
            for parameter in [p for section in doc_qa.parameters(doc.text) for p in section][:4]:
                answer = doc_qa.type_and_default(parameter)[what == "default"]
                sentence = next(iter(docstring_splits.sentences([parameter.description])), "")
                shown = " ".join(sentence.split()[:DESCRIPTION])
                if 0 < len(answer.split()) <= 4 and len(shown.split()) > 2 and answer.lower() not in shown.lower():
                    yield _candidate(doc, f"{parameter.name} is {shown} {what.title()}:", answer)

    return candidates


def _summaries(docs: list[Docstring]) -> Iterator[Candidate]:
    for doc in docs:
        found = doc_summary.summary_and_body(doc)
        if found and doc_summary.coverage(found[0], doc_summary.title(doc)) >= 0.2:
            yield _candidate(doc, f"{doc_summary.title(doc)}:", found[0])


def _sentences(lengths: range, cut: bool) -> Callable[[list[Docstring]], Iterator[Candidate]]:
    def candidates(docs: list[Docstring]) -> Iterator[Candidate]:
        for doc in docs:
            long = [s for s in docstring_splits.sentences(doc.blocks) if len(s.split()) in lengths and _is_prose(s)]
            for sentence in long[:1]:
                words = sentence.split()
                start = len(words) * 3 // 5 if cut else 0
                yield _candidate(doc, " ".join(words[:start]) or "In order:", " ".join(words[start:]), sentence)

    return candidates


def _candidate(doc: Docstring, instruction: str, output: str, text: str = "") -> Candidate:
    text = text or f"{instruction} {output}"
    return Candidate(doc.file, text, text, output, {"instruction": instruction, "output": output})


def _is_prose(sentence: str) -> bool:
    return bool(re.match(r"[A-Z][a-z]", sentence)) and len(re.findall(r"[A-Za-z ]", sentence)) > 0.9 * len(sentence)


def _other_labels(one: dict, answers: list[str], test: list[dict], rng: random.Random) -> list[str]:
    return sorted(set(doc_topic.LABELS.values()) - {one["output"]})


def _common_answers(one: dict, answers: list[str], test: list[dict], rng: random.Random) -> list[str]:
    return rng.sample([answer for answer in answers if answer.lower() != one["output"].lower()], CHOICES - 1)


def _other_outputs(one: dict, answers: list[str], test: list[dict], rng: random.Random) -> list[str]:
    """Of the ten outputs nearest in length."""
    others = sorted({other["output"] for other in test} - {one["output"]})
    others.sort(key=lambda other: abs(len(other) - len(one["output"])))
    return rng.sample(others[:10], CHOICES - 1)


def _shuffled(one: dict, answers: list[str], test: list[dict], rng: random.Random) -> list[str]:
    """The first word and the last stay; two of the others change places."""
    words = one["output"].split()
    found: list[str] = []
    while len(found) < CHOICES - 1:
        i, j = rng.sample(range(1, len(words) - 1), 2)
        other = words.copy()
        other[i], other[j] = other[j], other[i]
        if (text := " ".join(other)) not in (one["output"], *found):
            found.append(text)
    return found


# task: (its candidates, the share of examples that one answer may have, its wrong choices)
_TASKS = {
    "topic": (_topics, doc_topic.MOST_COMMON, _other_labels),
    "type": (_parameters("type"), 0.12, _common_answers),
    "default": (_parameters("default"), 0.2, _common_answers),
    "summary": (_summaries, 1.0, _other_outputs),
    "next": (_sentences(SENTENCE, cut=True), 1.0, _other_outputs),
    "order": (_sentences(ORDERED, cut=False), 1.0, _shuffled),
}
TASKS = tuple(_TASKS)
