"""Answers that need no understanding."""

import pytest

from expert_merging.analysis import references


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Question: What is the type of size? Context: shape : int. size : float, optional. The size.", "float"),
        (
            "Question: What is the type of size? Context: shape (int): No. size (float or None): The size.",
            "float or None",
        ),
        ("Question: Where is Rome? Context: The city of Rome is in Italy, Europe.", "is in Italy"),
        ("Question: Where is Rome? Context: Nobody knows.", ""),
        ("Summarize: fit. The model, a line, is fit.", ""),
    ],
)
def test_words_after_the_question_s_last_word(text, answer):
    assert references.words_after(text) == answer


@pytest.mark.parametrize(
    ("text", "lead"),
    [("Summarize:  fit model. It sees rows. ", "fit model"), ("Classify: No full stop", "No full stop"), ("odd", "")],
)
def test_first_sentence(text, lead):
    assert references.first_sentence(text) == lead


def test_the_nearest_shares_rare_words():
    train = ["the cat sat", "the dog ran", "a bird flew"]
    assert references.nearest(train, ["cat", "dog", "bird"], ["dog the the", "one bird", "the sat"]) == [
        "dog",
        "bird",
        "cat",
    ]


def test_of_equally_common_answers_the_first_in_the_alphabet():
    data = {"task": {"train": {"references": [["b"], ["a"], ["c", "a"]]}}}
    assert references.most_common_answers(data) == {"task": "a"}
