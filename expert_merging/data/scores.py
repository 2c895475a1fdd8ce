"""The three scores (paper, 4.1): each takes predictions and, for each of them, its references; values are 0..100.

Of each score there is the mean over examples, and (`..._each`) the main score of every example, which tests need.
"""

import base64
import tempfile
import zlib
from collections.abc import Sequence

import numpy as np


def accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"accuracy"}: the share of predictions equal to a reference, white space at both ends aside."""
    each = accuracy_each(predictions, references)
    return {"accuracy": sum(each) / len(each)}


def accuracy_each(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """100 where a prediction equals a reference, else 0."""
    _check(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return [100.0 * (prediction.strip() in {r.strip() for r in answers}) for prediction, answers in pairs]


def squad(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"exact_match", "f1"} of SQuAD v1.1, the best of a question's answers."""
    from expert_merging.data.metrics.squad_v1 import SquadV1  # evaluate takes seconds to import

    _check(predictions, references)
    # evaluate always makes itself a cache folder; a temporary one keeps the user's home clean.
    with tempfile.TemporaryDirectory(prefix="squad-metric-") as folder:
        metric = SquadV1(cache_dir=folder, keep_in_memory=True)
        return metric.compute(predictions=list(predictions), references=[list(r) for r in references])


def exact_match_each(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """SQuAD's exact match of each question, 0 or 100."""
    from expert_merging.data.metrics.squad_v1 import exact_match

    _check(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return [100 * max(exact_match(prediction, answer) for answer in answers) for prediction, answers in pairs]


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"rouge1", "rouge2", "rougeL"}: mean F1 without stemming, the best of an example's references."""
    each = _rouge_each(("rouge1", "rouge2", "rougeL"), predictions, references)
    return {name: 100 * sum(shares) / len(shares) for name, shares in each.items()}


def rouge_l_each(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L of each example."""
    return [100 * share for share in _rouge_each(("rougeL",), predictions, references)["rougeL"]]


def _rouge_each(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, list[float]]:
    """Of each example, from 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    _check(predictions, references)
    scorer = RougeScorer(names, use_stemmer=False)
    scores = [scorer.score_multi(list(r), p) for p, r in zip(predictions, references, strict=True)]
    return {name: [float(one[name].fmeasure) for one in scores] for name in names}


def pack(each: Sequence[float]) -> str:
    """Scores of 0..100 as a short text, to hundredths: two bytes each, deflated, in base 64."""
    hundredths = np.rint(100 * np.asarray(each, dtype=np.float64)).astype("<u2")
    return base64.b64encode(zlib.compress(hundredths.tobytes(), 9)).decode()


def unpack(text: str) -> np.ndarray:
    """What `pack` was given, to hundredths: [examples]. Raises ValueError when the text is damaged."""
    try:
        return np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), dtype="<u2") / 100
    except zlib.error as error:
        raise ValueError(f"packed scores are damaged: {error}") from error


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} examples; there must be as many, and some"
        )
    if any(isinstance(answers, str) or not answers for answers in references):
        raise ValueError("the references of an example must be a list of at least one string")
