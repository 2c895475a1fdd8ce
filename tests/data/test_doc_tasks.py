"""The three docstring tasks: on made-up docstrings, and on the whole installed corpus."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest

from expert_merging.data import docstring_reader
from expert_merging.data.docstring_reader import Docstring, normalized
from expert_merging.data.docstring_splits import SPLITS, split_of
from expert_merging.data.tasks import doc_qa, doc_summary, doc_topic

TASKS = {"doc_topic": doc_topic, "doc_qa": doc_qa, "doc_summary": doc_summary}
TINY = SimpleNamespace(seed=0, train_examples=3000, validation_examples=240, test_examples=300)


@pytest.fixture(scope="module")
def tiny():
    """What every task loads at scale tiny; reading the installed packages takes the better part of a minute."""
    return {name: task.load(TINY) for name, task in TASKS.items()}


@pytest.fixture(params=TASKS)
def name(request):
    return request.param


def test_there_are_as_many_examples_as_tiny_asks_for(tiny, name):
    assert {split: len(examples) for split, examples in tiny[name].items()} == {
        "train": 3000, "validation": 240, "test": 300,
    }  # fmt: skip


def test_no_text_stands_in_two_splits_or_twice(tiny, name):
    seen = {}
    for split, examples in tiny[name].items():
        for example in examples:
            letters = normalized(TASKS[name].prompt(example))
            assert letters not in seen, (seen[letters], split, example)
            seen[letters] = split


def test_held_out_sentences_are_mostly_new(tiny, name):
    """The share of the test inputs' sentences that any training docstring has, used in the task or not."""
    known = {p for doc in docstring_reader.read_docstrings() if split_of(doc.file) == "train" for p in doc.pieces}
    of_example = [docstring_reader.pieces_of_text(TASKS[name].prompt(example)) for example in tiny[name]["test"]]
    shares = [sum(len(p) for p in pieces if p in known) / max(1, sum(map(len, pieces))) for pieces in of_example]
    assert max(shares) <= 0.5 and sum(shares) / len(shares) < 0.1


def test_most_common_answer_is_a_poor_guess(tiny, name):
    task, limit = TASKS[name], {"doc_topic": 0.2, "doc_qa": 0.08, "doc_summary": 0.01}[name]
    for examples in tiny[name].values():
        (_, count), *_ = Counter(task.target(example).lower() for example in examples).most_common()
        assert count / len(examples) <= limit


def test_lengths_suit_a_small_model(tiny, name):
    lengths = [len(TASKS[name].prompt(example).split()) for example in tiny[name]["train"]]
    assert 30 < sum(lengths) / len(lengths) < 80 and max(lengths) < 130


def test_the_target_is_accepted_and_scores_in_full(tiny, name):
    task = TASKS[name]
    examples = tiny[name]["test"][:50]
    assert all(task.target(example) in task.references(example) for example in examples)
    references = [task.references(example) for example in examples]
    assert task.score([task.target(example) for example in examples], references)[task.main_score] == pytest.approx(100)
    assert task.score(["zzz"] * 50, references)[task.main_score] == 0


def test_prompts_begin_as_the_paper_s_do(tiny, name):
    pattern = {"doc_topic": "Classify: ", "doc_qa": r"Question: What .*\? Context: ", "doc_summary": "Summarize: "}[
        name
    ]
    assert all(re.match(pattern, TASKS[name].prompt(example)) for example in tiny[name]["test"])


def test_examples_do_not_depend_on_the_seed_of_the_run_and_repeat(tiny, name):
    again = TASKS[name].load(SimpleNamespace(**(vars(TINY) | {"seed": 7})))
    assert docstring_reader.corpus_hash(again) == docstring_reader.corpus_hash(tiny[name])


def test_fewer_are_the_first_of_more(tiny):
    few = doc_summary.load(SimpleNamespace(seed=0, train_examples=50, validation_examples=5, test_examples=10))
    assert few["test"] == tiny["doc_summary"]["test"][:10] and len(few["train"]) == 50


def test_topic_names_no_library(tiny):
    given_away = re.compile(r"numpy|scipy|sklearn|scikit|torch|pandas|\b(?:np|pd|plt)\.", re.I)
    for split in SPLITS:
        assert not [example for example in tiny["doc_topic"][split] if given_away.search(example["text"])]
        labels = Counter(example["label"] for example in tiny["doc_topic"][split])
        assert set(labels) == set(doc_topic.LABELS.values()) and min(labels.values()) > 0.08 * labels.total()


def test_answers_are_short_spans_of_their_context(tiny):
    for split in SPLITS:
        for example in tiny["doc_qa"][split]:
            assert all(answer in example["context"] for answer in example["answers"])
            assert len(example["answers"][0].split()) <= 8
            asked = re.fullmatch(r"What is the (?:type|default) of (\w+)\?", example["question"])[1]
            assert asked in example["context"]


def test_summaries_can_be_had_from_their_input(tiny):
    for example in tiny["doc_summary"]["test"]:
        assert doc_summary.coverage(example["summary"], example["document"]) >= doc_summary.COVERED
        assert 4 <= len(example["summary"].split()) <= 25
        assert normalized(example["summary"]) not in normalized(example["document"])


# ---------------------------------------------------------------- made-up docstrings


def of(text, name="package.module.fit_model", signature="fit_model(data, n_steps=3, *, tol=1e-3)"):
    return Docstring("package", "package/module.py", name, signature, docstring_reader.clean(text))


def test_masking():
    text = "Convert with np.asarray or torch.from_numpy; scikit-learn's arrays are NumPy arrays. pd.NA is pandas' own."
    assert doc_topic.masked(text) == (
        "Convert with asarray or from_library; library's arrays are library arrays. NA is library' own."
    )


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (
            "numpy",
            """Fit.

            Parameters
            ----------
            data : array-like of shape (n, 2)
                The data. It has two columns.
            n_steps : int, default=3
                Steps.

            tol : float, optional
                Tolerance. The default is 0.001.

            Returns
            -------
            model : object
                Not a parameter.
            """,
        ),
        (
            "google",
            """Fit.

            Args:
                data (`array-like of shape (n, 2)`): The data.
                    It has two columns.
                n_steps (`int`, *optional*, defaults to 3):
                    Steps.
                tol (float, optional): Tolerance. Default: 0.001

            Returns:
                model (object): Not a parameter.
            """,
        ),
        (
            "sphinx",
            """Fit.

            :param data: The data. It has
                two columns.
            :type data: array-like of shape (n, 2)
            :param int n_steps: Steps. Defaults to 3.
            :param tol: Tolerance. (default: 0.001)
            :type tol: float, optional
            :return: Not a parameter.
            """,
        ),
    ],
)
def test_parameters_of_three_styles(style, text):
    (section,) = doc_qa.parameters(of(text).text)
    assert [parameter.name for parameter in section] == ["data", "n_steps", "tol"]
    assert {parameter.style for parameter in section} == {style}
    assert section[0].description == "The data. It has two columns."
    assert [doc_qa.type_and_default(parameter) for parameter in section] == [
        ("array-like of shape (n, 2)", ""),
        ("int", "3"),
        ("float", "0.001"),
    ]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("int", ("int", "")),
        ("bool, default: True", ("bool", "True")),
        ("str, optional, defaults to 'full'", ("str", "'full'")),
        ("{'a', 'b'}, optional (default 'a')", ("{'a', 'b'}", "'a'")),
        ("float or None, default None.", ("float or None", "None")),
        ("tuple of int, default=(1, 2)", ("tuple of int", "(1, 2)")),
        ("float, default=-1.5", ("float", "-1.5")),
        ("dict, keyword-only", ("dict", "")),
    ],
)
def test_type_and_default(kind, expected):
    assert doc_qa.type_and_default(doc_qa.Parameter("x", kind, "", "numpy")) == expected


def test_two_defaults_in_a_description_are_none():
    described = "With a, the default is 1. With b, the default is 2."
    assert doc_qa.type_and_default(doc_qa.Parameter("x", "int", described, "numpy")) == ("int", "")


def test_the_asked_parameter_is_whole_and_among_others():
    entries = "\n".join(f"name{i} : kind{i}\n    Some words on what number {i} of them does." for i in range(30))
    asked = list(doc_qa.candidates([of(f"Fit.\n\nParameters\n----------\n{entries}")]))
    assert len(asked) == doc_qa.QUESTIONS_PER_DOCSTRING
    for candidate in asked:
        number = re.search(r"name(\d+)\?", candidate.example["question"])[1]
        assert candidate.example["answers"] == [f"kind{number}"]
        assert f"name{number} : kind{number}. Some words on what number {number} of them does." in candidate.text
        assert 2 <= candidate.text.count(" : kind") and len(candidate.example["context"].split()) <= 75


def test_title_is_plain_words():
    assert doc_summary.title(of("x")) == "fit model"
    assert doc_summary.title(of("x", "package.Box.__init__", "__init__(lid)")) == "Box"
    assert doc_summary.title(of("x", "package", "")) == "package"
    assert doc_summary.title(of("x", "package.BoxOfHTTPThings", "")) == "Box Of HTTP Things"


def test_summary_and_body():
    first, rest = "Fit the model to data.", "The model sees each row once. Then it stops."
    assert doc_summary.summary_and_body(of(f"{first}\n\n{rest}")) == (first, rest)
    assert doc_summary.summary_and_body(of(f"{first} {rest}")) == (first, rest)
    for unwanted in (
        first,
        f"Fit it.\n\n{rest}",
        f"See the guide for all that there is.\n\n{rest}",
        f"Deprecated alias of the other fitting function.\n\n{rest}",
        f"fit(data) -> model: does what its name says.\n\n{rest}",
    ):
        assert doc_summary.summary_and_body(of(unwanted)) is None, unwanted


def test_coverage_knows_words_by_their_stems_and_parts():
    assert doc_summary.coverage("Computes the squared distances.", "compute_distance of SquareMatrix") == 1
    assert doc_summary.coverage("Compute nothing.", "compute") == 0.5
    assert doc_summary.coverage("Is it the?", "anything") == 0


def test_overlap_is_of_content_words_by_their_stems():
    assert doc_summary.overlap("Load the model.", "loading_models") == 1
    assert doc_summary.overlap("Fit the model.", "model") == pytest.approx(2 / 3)
    assert doc_summary.overlap("Fit the model.", "of the") == 0


@pytest.mark.parametrize(
    ("name", "body", "kept"),
    [
        ("package.train", "The model sees each row of data once. Then it stops for good.", True),
        ("package.fit_model", "The model sees each row of data once. Then it stops for good.", False),  # its name tells
        (
            "package.train",
            "This fits a model. It sees each row of the data once, then it stops.",
            False,
        ),  # a sentence does
        ("package.train", "It sees each row once, then it stops, and nothing more comes after.", False),  # nothing does
    ],
)
def test_an_input_neither_gives_the_summary_away_nor_withholds_it(name, body, kept):
    doc = of(f"Fit the model here.\n\n{body}", name)
    assert any(doc_summary.examples([doc], {}).values()) == kept
