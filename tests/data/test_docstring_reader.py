"""The docstring corpus: reading without importing, cleaning, splits that do not leak."""

import re
import sys
import textwrap
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.core.errors import UserError
from expert_merging.data import docstring_reader, docstring_splits
from expert_merging.data.docstring_reader import Docstring, blocks, clean, normalized
from expert_merging.data.docstring_splits import Candidate, split_examples, split_of

MODULE = '''
"""The module, which says enough about itself."""
raise RuntimeError("this module must never run")

class Box:
    """A box that holds things of many kinds."""

    async def fill(self, things, *more, size=(1, 2), **kwargs):
        """Fill the box with many things at once."""

try:
    def lid(a, /, b: int = 3, *, c) -> None:
        """Close the lid of the box, gently please."""
except ImportError:
    def lid():
        """Say that there is no lid on this box."""

add_docstr(torch.abs, r"""
abs(input, *, out=None) -> Tensor

Computes the absolute value of each element.
""")
add_newdoc("numpy", "ndarray", ("flat", """A flat view of what the array holds."""))
'''


def written(folder, name="boxes_for_test", module=MODULE):
    package = folder / name
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "box.py").write_text(module)
    (package / "plain.py").write_text("x = 1\n")
    (package / "broken.py").write_text('"""A file that is no Python at all."""\nthis is not (python\n')
    (package / "tests" / "test_box.py").write_text('"""A test that must not be read by anyone."""\n')
    return name


@pytest.fixture
def read():
    """read_docstrings without its memory: the tests' packages come and go."""
    return docstring_reader.read_docstrings.__wrapped__


def test_reads_every_kind_of_docstring_and_imports_nothing(tmp_path, monkeypatch, read):
    monkeypatch.syspath_prepend(tmp_path)
    docs = read((written(tmp_path),))
    assert "boxes_for_test" not in sys.modules
    assert [(d.name, d.signature) for d in docs] == [
        ("boxes_for_test.box", ""),
        ("boxes_for_test.box.Box", ""),
        ("boxes_for_test.box.Box.fill", "fill(things, *more, size=(1, 2), **kwargs)"),
        ("boxes_for_test.box.lid", "lid(a, b=3, c)"),
        ("boxes_for_test.box.lid", "lid()"),
        ("boxes_for_test.box.torch.abs", "abs(input, *, out=None)"),
        ("boxes_for_test.box.numpy.ndarray.flat", ""),
    ]
    assert {(d.package, d.file) for d in docs} == {("boxes_for_test", "boxes_for_test/box.py")}
    assert docs[5].text == "Computes the absolute value of each element."


def test_text_does_not_depend_on_where_packages_lie_or_on_line_ends(tmp_path, monkeypatch, read):
    found = []
    for folder, module in (("here", MODULE), ("there", MODULE.replace("\n", "\r\n"))):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(tmp_path / folder)
            found.append(read((written(tmp_path / folder, module=module),)))
    assert found[0] == found[1] and found[0]
    assert docstring_reader.corpus_hash([d.text for d in found[0]]) == docstring_reader.corpus_hash(
        [d.text for d in found[1]]
    )


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match="no_such_package_here"):
        list(docstring_reader.source_files("no_such_package_here"))


def test_the_patched_model_is_never_read():
    files = [file for file, _ in docstring_reader.source_files("transformers")]
    assert "transformers/models/t5/modeling_t5.py" in files and files == sorted(files)
    assert not [file for file in files if "switch_transformers" in file]


def test_standard_library_comes_without_site_packages_and_tests():
    files = {file for file, _ in docstring_reader.source_files(docstring_reader.STANDARD_LIBRARY)}
    assert "python/json/decoder.py" in files
    assert not [file for file in files if re.search(r"site-packages|dist-packages|/tests?/", file)]


RAW = r"""
    Solve the system ``A x = b`` with :func:`~linalg.lu`, see `the page <https://example.org>`_ [1]_.

    A *longer* text with :math:`O(n)` steps and `names`, [`Class.method`] and **bold**:

    .. math:: \alpha = \beta

    .. versionadded:: 1.2
       Of no interest.

    .. note::
        Keep this remark.

    >>> solve(1)
    2

    The table::

        a literal block

    ====  ====
    left  right
    ====  ====

    Parameters
    ----------
    A : (M, M) array_like, optional
        The matrix of the system, taken from
        https://example.org/matrix here.

    Examples
    --------
    >>> 1 + 1
    2

    Returns
    -------
    x : ndarray
        The solution.
    """
CLEAN = """\
Solve the system A x = b with linalg.lu, see the page.

A longer text with O(n) steps and names, Class.method and bold:

    Keep this remark.

The table:

Parameters
----------
A : (M, M) array_like, optional
    The matrix of the system, taken from
     here.

Returns
-------
x : ndarray
    The solution."""


def test_cleaning_leaves_english():
    assert clean(RAW) == CLEAN


def test_cleaning_markdown_and_google_style():
    raw = """Load a model.

    <Tip>

    Read [the guide](https://example.org/a) first.

    </Tip>

    Args:
        name (`str`, *optional*, defaults to `"base"`):
            Name of the model.
        *args, **kwargs: the rest.

    Example:

        load("base")

    ```python
    load("large")
    ```
    """
    assert [line.strip() for line in clean(raw).split("\n") if line.strip()] == [
        "Load a model.",
        "Read the guide first.",
        "Args:",
        'name (str, optional, defaults to "base"):',
        "Name of the model.",
        "*args, **kwargs: the rest.",
    ]


def test_blocks_are_paragraphs_and_parameters():
    assert blocks(CLEAN) == [
        "Solve the system A x = b with linalg.lu, see the page.",
        "A longer text with O(n) steps and names, Class.method and bold:",
        "Keep this remark.",
        "The table:",
        "Parameters.",
        "A : (M, M) array_like, optional.",
        "The matrix of the system, taken from here.",
        "Returns.",
        "x : ndarray.",
        "The solution.",
    ]


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("`*:.>-=|\n  []()<_$\\"), max_size=200))
def test_any_text_can_be_cleaned(raw):
    cleaned = clean(raw)
    assert ">>> " not in [line.strip()[:4] for line in cleaned.split("\n")]
    assert all(block.strip() and "\n" not in block for block in blocks(cleaned))


@given(st.text(max_size=100))
def test_normalized_keeps_lower_case_letters_alone(text):
    assert normalized(text) == re.sub(r"[\W\d_]+", "", text.lower())


def test_splits_are_80_3_and_17_percent_and_follow_families():
    counts = Counter(split_of(f"package/folder{i % 50}/file{i}.py") for i in range(4000))
    assert abs(counts["train"] / 4000 - 0.8) < 0.03 and abs(counts["test"] / 4000 - 0.17) < 0.03
    for family in (
        ["transformers/models/bert/modeling_bert.py", "transformers/models/t5/tokenization_t5.py"],
        ["pandas/core/frame.py", "pandas/core/series.py", "pandas/core/generic.py"],
        ["torch/nn/quantized/modules/conv.py", "torch/ao/nn/quantized/modules/conv.py"],
        ["scipy/linalg/decomp_qr.py", "scipy/linalg/_decomp_qr.py"],
        ["narwhals/dataframe.py", "narwhals/stable/v1/dataframe.py"],
    ):
        assert len({split_of(file) for file in family}) == 1, family


def doc(file, text, name="x"):
    return Docstring(file.partition("/")[0], file, name, "", text)


def file_in(split, number=0):
    return [f for f in (f"package/{split}/file{i}.py" for i in range(1000)) if split_of(f) == split][number]


def test_pretraining_texts_are_training_texts_without_repeats():
    sentence = "Number of samples that a leaf of the tree must have at the very least."
    own = ["Grow a tree on weighted samples of the data.", "Prune the tree by its weakest links, one at a time."]
    docs = [
        doc(file_in("train"), f"{own[0]}\n\n{sentence}"),
        doc(file_in("train", 1), f"{own[1]}\n\nmin_leaf (int):\n    {sentence.upper()}"),
        doc(file_in("test"), "Test text must not be seen before the test, not in pre-training either."),
        doc(file_in("validation"), "Validation text must not be seen in pre-training either, of course."),
    ]
    texts = docstring_splits.pretraining_texts(docs)
    assert texts == [f"x: {own[0]} {sentence}", f"x: {own[1]}"]


words = st.sampled_from("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda omega".split())
passage = st.lists(words, min_size=6, max_size=10).map(" ".join)
candidate = st.builds(
    lambda split, number, sentences, label: Candidate(
        file_in(split, number),
        sentences[0],
        ". ".join(sentences),
        label,
        {"text": ". ".join(sentences), "label": label},
    ),
    st.sampled_from(docstring_splits.SPLITS),
    st.integers(0, 2),
    st.lists(passage, min_size=1, max_size=3),
    st.sampled_from("abc"),
)


@given(st.lists(candidate, max_size=40), st.integers(0, 12), st.sampled_from([0.34, 0.5, 1.0]))
def test_split_examples(candidates, size, most_common):
    docs = [doc(c.file, c.text) for c in candidates]
    sizes = dict.fromkeys(docstring_splits.SPLITS, size)
    chosen = split_examples(docs, candidates, sizes, most_common)
    assert chosen == split_examples(docs, candidates, sizes, most_common)

    split_of_text = {}
    for split, examples in chosen.items():
        assert len(examples) <= size or size == 0
        counts = Counter(example["label"] for example in examples)
        assert all(count <= max(1, most_common * len(examples)) for count in counts.values())
        for example in examples:
            assert split_of_text.setdefault(normalized(example["text"]), split) == split
            assert any(c.example == example and split_of(c.file) == split for c in candidates)
    texts = [normalized(example["text"]) for examples in chosen.values() for example in examples]
    assert len(texts) == len(set(texts))


def test_half_known_text_is_left_out_of_the_test_split():
    known = "These words stand in a training docstring already, all of them"
    fresh = "Nobody has read these other words before the day of the test itself and none could"
    files = [file_in("train"), file_in("test")]
    docs = [doc(files[0], known), doc(files[1], f"{known}. {fresh}")]

    def kept(text):
        candidates = [Candidate(files[1], text, text, "a", {"text": text})]
        return len(split_examples(docs, candidates, {}, 1.0)["test"])

    assert kept(fresh) == 1
    assert kept(f"{known}. {fresh}") == 1  # a known sentence, but not most of the text
    assert kept(f"{known.upper()}!  Short end.") == 0


def test_corpus_hash_tells_corpora_apart():
    assert docstring_reader.corpus_hash(["a", "b"]) == docstring_reader.corpus_hash(("a", "b"))
    assert docstring_reader.corpus_hash(["a", "b"]) != docstring_reader.corpus_hash(["b", "a"])
    assert docstring_reader.corpus_hash({"x": 1, "y": 2}) == docstring_reader.corpus_hash({"y": 2, "x": 1})
    assert len(docstring_reader.corpus_hash([])) == 64


def test_broken_source_is_passed_over(tmp_path, monkeypatch, read):
    monkeypatch.syspath_prepend(tmp_path)
    name = written(tmp_path, module=textwrap.dedent('def f(:\n  """A docstring in what cannot be parsed."""\n'))
    assert read((name,)) == []
