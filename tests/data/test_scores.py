"""Scores: tables of values worked out by hand from the published definitions, and properties."""

import os
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.data.metrics.squad_v1 import exact_match, f1
from expert_merging.data.scores import accuracy, pack, rouge, squad, unpack
from expert_merging.data.tasks import get_task, task_names

words = st.lists(st.sampled_from(["cat", "The", "a", "mat.", "--", "naïve", "1,000"]), max_size=6).map(" ".join)


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f"),
    [
        ("The Cat", ["cat."], 100, 100),  # case, article, punctuation
        ("  cat \n sat ", ["cat sat"], 100, 100),  # white space
        ("twenty-one", ["twentyone"], 100, 100),  # punctuation leaves no space
        ("theory", ["ory"], 0, 0),  # an article is a whole word
        ("an apple a day", ["apple day"], 100, 100),
        ("a", ["the"], 100, 0),  # nothing left on either side: equal, but without a shared word
        ("", ["cat"], 0, 0),
        ("New York City", ["New York"], 0, 80),  # P 2/3, R 1
        ("cat cat", ["cat"], 0, 200 / 3),  # P 1/2, R 1: words are counted
        ("Beyoncé’s", ["beyoncés"], 0, 0),  # only ASCII punctuation goes
        ("cat", ["dog", "the cat", "cat sat"], 100, 100),  # the best answer
        ("New York City", ["York", "New York City Hall"], 0, 600 / 7),  # F1's best answer: P 1, R 3/4
    ],
)
def test_squad_table(prediction, answers, em, f):
    assert squad([prediction], [answers]) == pytest.approx({"exact_match": em, "f1": f})


def test_squad_is_the_mean_over_questions():
    assert squad(["cat", "dog", "x y"], [["cat"], ["cat"], ["y"]]) == pytest.approx(
        {"exact_match": 100 / 3, "f1": (100 + 200 / 3) / 3}
    )


@given(words, words)
def test_squad_properties(one, other):
    assert f1(one, other) == f1(other, one)
    assert 0 <= f1(one, other) <= 1
    assert exact_match(one, other) == exact_match(other, one)
    if exact_match(one, other):
        assert f1(one, other) in (0.0, 1.0)
    assert f1(" ".join(reversed(one.split())), other) == f1(one, other)
    assert exact_match(one.upper() + "!", other) == exact_match(one, other)


def test_squad_leaves_no_files(tmp_path, monkeypatch):
    import evaluate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    squad(["cat"], [["cat"]])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        # The example in rouge-score's documentation: 6 of 8 and 9 words; longest common subsequence 5.
        (
            "The quick brown dog jumps on the log.",
            ["The quick brown fox jumps over the lazy dog"],
            (12 / 17, 4 / 15, 10 / 17),
        ),
        ("the cat sat", ["the cat"], (4 / 5, 2 / 3, 4 / 5)),
        ("running dogs", ["runs dog"], (0, 0, 0)),  # no stemming
        ("The CAT, sat", ["the cat sat"], (1, 1, 1)),  # case and punctuation do not count
        ("", ["the cat"], (0, 0, 0)),
        ("b a", ["a b"], (1, 0, 1 / 2)),
        ("the cat", ["no", "the cat"], (1, 1, 1)),
    ],
)
def test_rouge_table(prediction, references, expected):
    assert rouge([prediction], [references]) == pytest.approx(
        dict(zip(["rouge1", "rouge2", "rougeL"], [100 * x for x in expected], strict=True))
    )


def test_accuracy():
    assert accuracy([" World\n", "world", "Sports"], [["World"], ["World"], ["Business", "Sports"]]) == {
        "accuracy": pytest.approx(200 / 3)
    }


@pytest.mark.parametrize("score", [accuracy, squad, rouge])
@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], ["a"]), (["a"], [[]])])
def test_scores_refuse_what_they_cannot_mean(score, predictions, references):
    with pytest.raises(ValueError):
        score(predictions, references)


@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_the_main_score_is_the_mean_of_each_example_s(pairs):
    predictions, references = zip(*pairs, strict=True)
    for task in map(get_task, task_names()):
        each = task.score_each(predictions, references)
        assert len(each) == len(pairs) and np.mean(each) == pytest.approx(
            task.score(predictions, references)[task.main_score]
        )
        alone = [task.score([p], [r])[task.main_score] for p, r in pairs]
        assert each == pytest.approx(alone)


@given(st.lists(st.integers(0, 10_000), max_size=50))
def test_packed_scores_come_back_to_hundredths(hundredths):
    text = pack([one / 100 for one in hundredths])
    assert unpack(text).tolist() == [one / 100 for one in hundredths]
    assert text.isascii() and "\n" not in text


def test_packed_scores_are_short():
    rng = random.Random(0)
    assert len(pack([100.0 * (rng.random() < 0.4) for _ in range(2000)])) < 600


@pytest.mark.parametrize("text", ["eJx", "AAAA", "not base 64"])
def test_damaged_packed_scores_are_no_scores(text):
    with pytest.raises(ValueError):
        unpack(text)
