"""Pre-training: which text, in which order, and at which rate. Kills are tests/faults.py's."""

from types import SimpleNamespace

import numpy as np
import pytest
from raw_data import sentences, tiny_tokenizer

from expert_merging.core.errors import UserError
from expert_merging.run import results
from expert_merging.training import pretraining


@pytest.fixture
def c():
    return SimpleNamespace(
        batch_chunks=2, chunk_tokens=20, steps_per_round=10, docstring_share=0.3, seed=0, num_rounds=4
    )


@pytest.fixture
def text():
    """Docstrings of the token 5, other documents of the token 6."""
    documents = {name: [np.full(30, token) for _ in range(40)] for name, token in (("docstrings", 5), ("extra", 6))}
    return pretraining.Corpus(tiny_tokenizer(), {**documents, "heldout": []}, {})


def tokens_of(steps):
    return [{5, 6}.intersection(batch["input_ids"].flatten().tolist()) for (batch,) in steps]


def test_a_share_of_the_batches_are_docstrings(c, text):
    kinds = tokens_of(pretraining.steps_of_round(0, text, c))
    assert sum(kind == {5} for kind in kinds) == 3 and sum(kind == {6} for kind in kinds) == 7


def test_without_other_text_all_are(c, text):
    text.extra = []
    assert all(kind == {5} for kind in tokens_of(pretraining.steps_of_round(0, text, c)))


def test_a_round_is_the_same_again_and_not_another(c, text):
    first, again, other = (pretraining.steps_of_round(number, text, c) for number in (1, 1, 2))
    same = [np.array_equal(a["input_ids"], b["input_ids"]) for (a,), (b,) in zip(first, again, strict=True)]
    assert all(same)
    assert tokens_of(first) != tokens_of(other)


def test_a_base_that_is_there_is_not_taken_for_another(tmp_path, capsys):
    base, work, wanted = tmp_path / "base", tmp_path / "base.run", {"num_rounds": 4, "seed": 0, "precision": "fp32"}
    assert not pretraining.is_done(base, wanted, work)
    base.mkdir()
    with pytest.raises(UserError, match="base is there, and was not pre-trained here; name another folder"):
        pretraining.is_done(base, wanted, work)
    results.save(base / "pretraining.json", {"num_rounds": 4, "seed": 0, "text_sha256": "x", "scale": "tiny"}, {})
    assert (
        pretraining.is_done(base, wanted | {"scale": "night"}, work) and "is there already" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="num_rounds was 4, is now 3"):
        pretraining.is_done(base, wanted | {"num_rounds": 3}, work)


def test_text_that_was_read_is_not_taken_for_another_folders(c, tmp_path, monkeypatch):
    c.heldout_texts, c.vocab_size, c.extra_text = 2, 200, ""
    monkeypatch.setattr(pretraining.docstring_reader, "read_docstrings", lambda: [])
    monkeypatch.setattr(pretraining.docstring_splits, "pretraining_texts", lambda docs: sentences(20))
    facts = pretraining.corpus(c, tmp_path / "run" / "text").facts
    assert pretraining.corpus(c, tmp_path / "run" / "text").facts == facts
    c.extra_text = str(tmp_path)
    with pytest.raises(UserError, match="extra_text: this run was begun with none; restore that, or remove .*run"):
        pretraining.corpus(c, tmp_path / "run" / "text")


def test_the_rate_rises_stays_and_falls():
    assert pretraining.rate(0, 10) == 0 and pretraining.rate(0.05, 10) == 1 == pretraining.rate(0.7, 10)
    assert pretraining.rate(0.85, 10) == pytest.approx(0.5) and pretraining.rate(1, 10) == 0
