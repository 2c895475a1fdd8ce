"""Scores: tables of values worked out by hand from the published definitions, and properties."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.data.metrics.squad_v1 import exact_match, f1
from expert_merging.data.scores import accuracy, rouge, squad

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
