"""Which library does this text come from? Classification of passages of docstrings, the stand-in for AG News."""

import re
from collections.abc import Iterable, Iterator

from expert_merging.data import docstring_reader, docstring_splits
from expert_merging.data.docstring_reader import Docstring
from expert_merging.data.docstring_splits import Candidate
from expert_merging.data.scores import accuracy as score
from expert_merging.data.scores import accuracy_each as score_each

main_score = "accuracy"

LABELS = {
    "numpy": "NumPy",
    "pandas": "pandas",
    "python": "Standard library",
    "scipy": "SciPy",
    "sklearn": "scikit-learn",
    "torch": "PyTorch",
}
MOST_COMMON = 0.18  # share of a split that one label may have; six even ones have 0.17
SHORTEST, LONGEST = 20, 50  # words of a passage
PASSAGES_PER_DOCSTRING = 3

# A name or an alias with its dot goes ("np.abs" -> "abs"); elsewhere it becomes "library".
_NAMES = r"(?:num|sci)py|scikit-?learn|scikits?|sklearn|(?:py|lib)?torch|pandas|matplotlib|stdlib|standard library"
_PREFIX = re.compile(rf"\b(?:{_NAMES}|np|pd|plt|sp|F|th)\.(?=\w)", re.I)
_NAME = re.compile(_NAMES, re.I)


def masked(text: str) -> str:
    """The text without the names that say where it comes from."""
    return _NAME.sub("library", _PREFIX.sub("", text))


def passages(doc: Docstring) -> Iterator[str]:
    """Runs of whole sentences of a docstring, SHORTEST..LONGEST words each; section headings are left out."""
    prose = [block for block in doc.blocks if len(block.split()) > 2]
    current: list[str] = []
    for sentence in docstring_splits.sentences(prose):
        words = sentence.split()
        if current and len(current) + len(words) > LONGEST:
            yield from _passage(current)
            current = []
        if len(words) <= LONGEST:
            current += words
    yield from _passage(current)


def _passage(words: list[str]) -> Iterator[str]:
    text = " ".join(words)
    if len(words) >= SHORTEST and len(re.findall("[a-zA-Z]", text)) > 0.7 * len(text.replace(" ", "")):
        yield text


def examples(docs: Iterable[Docstring], sizes: dict[str, int]) -> dict[str, list[dict]]:
    """Each split's examples: {"text", "label"}."""
    candidates = (
        Candidate(
            doc.file, masked(text), text, LABELS[doc.package], {"text": masked(text), "label": LABELS[doc.package]}
        )
        for doc in docs
        if doc.package in LABELS
        for text in list(passages(doc))[:PASSAGES_PER_DOCSTRING]
    )
    return docstring_splits.split_examples(docs, candidates, sizes, MOST_COMMON)


def load(constants) -> dict[str, list[dict]]:
    """Raw examples of each split. Raises UserError when a package whose text is read is not installed."""
    return examples(docstring_reader.read_docstrings(), docstring_splits.sizes_of(constants))


def prompt(example: dict) -> str:
    return "Classify: " + example["text"]


def target(example: dict) -> str:
    return example["label"]


def references(example: dict) -> list[str]:
    return [example["label"]]


__all__ = ["load", "main_score", "prompt", "references", "score", "score_each", "target"]
