"""Write the first line of a docstring from its name and the rest of it: the stand-in for XSum.

Kept are examples whose input neither withholds the summary (a third of its words, lightly stemmed, must stand there) nor
gives it away (the name and every sentence must differ from it; many a function's name is its summary without the
article, and copying that would beat most models). The input shows where the summary is missing by T5's first sentinel, as
pre-training did.
"""

import re
from collections.abc import Iterable, Iterator

from expert_merging.data import docstring_reader, docstring_splits
from expert_merging.data.docstring_reader import Docstring
from expert_merging.data.docstring_splits import Candidate
from expert_merging.data.scores import rouge as score
from expert_merging.data.scores import rouge_l_each as score_each

main_score = "rougeL"

SHORTEST, LONGEST = 4, 25  # words of a summary
LONGEST_BODY = 60  # words
COVERED = 1 / 3  # share of the summary's content words that the input has, at least
ALIKE = 0.5  # F1 of the content words of the summary and of the name or of a sentence of the input, at most
MISSING = "<extra_id_0>"  # where the summary would stand

_STOP = set(
    "a an the of to in on for from by with at as is are be been was were it its this that these those and or not if "
    "into than then when which whose will would can may must should do does has have had s via".split()
)
_UNWANTED = re.compile(
    r"deprecated|alias (?:of|for)|\bsee\b|internal use|do not use|subclass|\boverrides?\b|"
    r"this (?:function|method|class) is|\bTODO\b|"
    r"copied from|\bin-place version\b|same as|\{\w*\}|\bwrapper (?:around|for|of|over)\b",
    re.I,
)


def words_of(text: str) -> list[str]:
    """Lower-case words, snake_case and CamelCase taken apart."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_", " ", text)
    return re.findall(r"[a-z]+|\d+", spaced.lower())


_ENDINGS = ("ization", "ations", "ation", "ating", "ates", "ated", "ings", "ing", "ies", "ied", "es", "ed", "s", "e")


def _stem(word: str) -> str:
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _stems(text: str) -> list[str]:
    return [_stem(word) for word in words_of(text) if word not in _STOP]


def coverage(summary: str, text: str) -> float:
    """The share of the summary's content words, lightly stemmed, that `text` has."""
    wanted, there = _stems(summary), set(_stems(text))
    return sum(word in there for word in wanted) / len(wanted) if wanted else 0.0


def overlap(first: str, second: str) -> float:
    """F1 of the content words, lightly stemmed, of two texts: 1 where they are the same, 0 where none is shared."""
    one, other = set(_stems(first)), set(_stems(second))
    return 2 * len(one & other) / (len(one) + len(other)) if one & other else 0.0


def title(doc: Docstring) -> str:
    """The name in plain words: `fit_predict` -> "fit predict"."""
    *_, owner, name = "", *doc.name.split(".")
    name = owner if name == "__init__" else name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).replace("_", " ").strip()


def summary_and_body(doc: Docstring) -> tuple[str, str] | None:
    """The summary line and the text after it, cut at LONGEST_BODY words; None where either does not serve."""
    summary, *rest = docstring_splits.sentences(doc.blocks) or [""]
    if not SHORTEST <= len(summary.split()) <= LONGEST or not re.match(r"[A-Z][a-z]", summary) or summary[-1] != ".":
        return None
    if _UNWANTED.search(summary) or len(re.findall(r"[A-Za-z ]", summary)) < 0.85 * len(summary):
        return None
    body: list[str] = []
    for sentence in rest:
        if sum(len(s.split()) for s in body) + len(sentence.split()) > LONGEST_BODY:
            break
        body.append(sentence)
    while body and (len(body[-1].split()) == 1 or body[-1].endswith(":")):  # a heading, or what led to a code block
        body.pop()
    return (summary, " ".join(body)) if body else None


def examples(docs: Iterable[Docstring], sizes: dict[str, int]) -> dict[str, list[dict]]:
    """Each split's examples: {"document", "summary"}."""

    def candidates() -> Iterator[Candidate]:
        for doc in docs:
            pair = summary_and_body(doc)
            if pair is None:
                continue
            summary, body = pair
            document = f"{title(doc)}. {body}"
            copied = docstring_reader.normalized(summary) in docstring_reader.normalized(document)
            if len(body.split()) < len(summary.split()) or copied or coverage(summary, document) < COVERED:
                continue
            parts = [title(doc), *docstring_splits.sentences([body])]
            if max(overlap(summary, part) for part in parts) <= ALIKE:
                yield Candidate(doc.file, summary, document, summary, {"document": document, "summary": summary})

    return docstring_splits.split_examples(docs, candidates(), sizes, most_common=1.0)


def load(constants) -> dict[str, list[dict]]:
    """Raw examples of each split. Raises UserError when a package whose text is read is not installed."""
    return examples(docstring_reader.read_docstrings(), docstring_splits.sizes_of(constants))


def prompt(example: dict) -> str:
    return f"Summarize: {MISSING} {example['document']}"


def target(example: dict) -> str:
    return example["summary"]


def references(example: dict) -> list[str]:
    return [example["summary"]]


__all__ = ["load", "main_score", "prompt", "references", "score", "score_each", "target"]
