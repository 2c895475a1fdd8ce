"""The model from its two files alone, and in our own words."""

import importlib
import io
import shutil
import tokenize
from pathlib import Path

import pytest
import torch
import transformers.models
from stock_switch import PLAIN, batch, build, needs_stock, ours, same, stock

CAEM_FILES = Path(__file__).resolve().parents[2] / "caem_files"
FILES = ("configuration_switch_transformers.py", "modeling_switch_transformers.py")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The two files under the stock names, imported as a package of transformers without the others."""
    folder = tmp_path_factory.mktemp("models") / "switch_alone"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name in FILES:
        shutil.copy(CAEM_FILES / name, folder)
    transformers.models.__path__.append(str(folder.parent))
    yield importlib.import_module("transformers.models.switch_alone.modeling_switch_transformers")
    transformers.models.__path__.remove(str(folder.parent))


def test_the_two_files_alone_are_a_working_model(alone):
    model = build(alone, PLAIN)
    with_all = build(ours, PLAIN)
    data = batch(0)
    assert alone.cpu_kernels is None and ours.cpu_kernels is not None
    same(model(**data), with_all(**data))
    model(**data).loss.backward()
    ids = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
    same(model.generate(**ids, num_beams=3, max_new_tokens=6), with_all.generate(**ids, num_beams=3, max_new_tokens=6))


def test_without_the_method_caem_says_what_to_copy(alone):
    model = build(alone, PLAIN)
    with pytest.raises(ImportError, match=r"copy caem_files/caem\.py to .*switch_alone$"):
        model.caem([model, model], model, 4, 4, 4)


def test_large_products_go_the_plain_way_without_the_kernels(alone):
    assert type(build(alone, PLAIN).lm_head) is torch.nn.Linear


# ------------------------------------------------------------------------------------------------------------------


SILENT = (
    *(tokenize.ENCODING, tokenize.ENDMARKER, tokenize.COMMENT, tokenize.NL),
    *(tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
)


def words(path):
    """(token, line) of a file without comments, docstrings, layout and signatures of functions."""
    found, in_signature, depth = [], False, 0
    source = path.read_bytes()
    previous = None
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        kind, text = token.type, token.string
        if kind in SILENT:
            if kind in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
                previous = None
            continue
        if kind == tokenize.STRING and previous is None:  # a statement that is a string
            continue
        previous = text
        if text == "def":
            in_signature = True
        if in_signature:
            depth += text in "([{" if kind == tokenize.OP else 0
            depth -= text in ")]}" if kind == tokenize.OP else 0
            if text == ":" and depth == 0:
                in_signature = False
            continue
        found.append((text, token.start[0]))
    return found


def runs_in_common(ours, theirs, length):
    """The runs of at least so many tokens that also stand in the other file: (first line, last line, tokens)."""
    a, b = [text for text, _ in ours], [text for text, _ in theirs]
    known = {tuple(b[i : i + length]) for i in range(len(b) - length + 1)}
    hits = [i for i in range(len(a) - length + 1) if tuple(a[i : i + length]) in known]
    runs = []
    for i in hits:
        if runs and i <= runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return [(ours[first][1], ours[last + length - 1][1], last + length - first) for first, last in runs]


@needs_stock
@pytest.mark.parametrize("name", FILES)
def test_no_passage_is_as_in_the_stock_file(name):
    kept = Path(stock.__file__).with_name(name)
    assert runs_in_common(words(CAEM_FILES / name), words(kept), 40) == []


def test_a_run_in_common_is_found(tmp_path):
    (tmp_path / "a.py").write_text('def f(x):\n    """Doc."""\n    return [x, 1, 2, 3, 4]\n')
    (tmp_path / "b.py").write_text("y = 5\n\n\ndef g(zz):\n    return [x, 1, 2,  # more\n        3, 4]\n")
    a, b = words(tmp_path / "a.py"), words(tmp_path / "b.py")
    assert runs_in_common(a, b, 8) == [(3, 3, 12)] and runs_in_common(a, b, 13) == []
