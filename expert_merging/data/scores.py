"""The three scores (paper, 4.1): each takes predictions and, for each of them, its references; values are 0..100."""

import tempfile
from collections.abc import Sequence


def accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"accuracy"}: the share of predictions equal to a reference, white space at both ends aside."""
    _check(predictions, references)
    pairs = zip(predictions, references, strict=True)
    right = sum(prediction.strip() in {r.strip() for r in answers} for prediction, answers in pairs)
    return {"accuracy": 100 * right / len(predictions)}


def squad(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"exact_match", "f1"} of SQuAD v1.1, the best of a question's answers."""
    from expert_merging.data.metrics.squad_v1 import SquadV1  # evaluate takes seconds to import

    _check(predictions, references)
    # evaluate always makes itself a cache folder; a temporary one keeps the user's home clean.
    with tempfile.TemporaryDirectory(prefix="squad-metric-") as folder:
        metric = SquadV1(cache_dir=folder, keep_in_memory=True)
        return metric.compute(predictions=list(predictions), references=[list(r) for r in references])


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"rouge1", "rouge2", "rougeL"}: mean F1 without stemming, the best of an example's references."""
    from rouge_score.rouge_scorer import RougeScorer

    _check(predictions, references)
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=False)
    scores = [scorer.score_multi(list(r), p) for p, r in zip(predictions, references, strict=True)]
    return {name: 100 * sum(float(s[name].fmeasure) for s in scores) / len(scores) for name in names}


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} examples; there must be as many, and some"
        )
    if any(isinstance(answers, str) or not answers for answers in references):
        raise ValueError("the references of an example must be a list of at least one string")
