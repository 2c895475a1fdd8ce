"""SQuAD v1.1's exact match and F1 (Rajpurkar et al., 2016), as the data set's official evaluation script counts them.

An answer is compared after lower-casing, removing ASCII punctuation, removing the words a, an and the, and squeezing
white space. Each question takes its best given answer, for exact match and for F1 apart.
"""

import re
import string
from collections import Counter

import datasets
import evaluate

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """The form in which two answers are compared."""
    # Punctuation goes first: what "the-end" leaves is one word, in which there is no article.
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1.0 when both are the same after normalisation, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1(prediction: str, answer: str) -> float:
    """F1 of the two bags of words, in [0, 1]; 0 where they share no word, two empty answers included."""
    predicted, given = normalize_answer(prediction).split(), normalize_answer(answer).split()
    shared = (Counter(predicted) & Counter(given)).total()
    # 2PR / (P + R), with P = shared / predicted words and R = shared / given words.
    return 2 * shared / (len(predicted) + len(given)) if shared else 0.0


class SquadV1(evaluate.Metric):
    """`compute(predictions=[str], references=[[str, ...]])` -> {"exact_match", "f1"}, both 0..100."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions: an answer a question; references: all given answers of each question.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        def mean_best(measure) -> float:
            pairs = zip(predictions, references, strict=True)
            return 100 * sum(max(measure(p, answer) for answer in answers) for p, answers in pairs) / len(predictions)

        return {"exact_match": mean_best(exact_match), "f1": mean_best(f1)}
