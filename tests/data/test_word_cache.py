"""Token ids word by word are those of the text as a whole, whatever the tokenizer and the text."""

import numpy as np
import pytest
import raw_data
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from expert_merging.data.word_cache import WordCache


def trained(model, trainer, normalizer, pre_tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.train_from_iterator(raw_data.sentences(200), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def as_t5():
    """What transformers makes of T5's vocabulary: unigrams, cut at spaces, rows of spaces one."""
    special = ["<pad>", "</s>", "<unk>"]
    return trained(
        models.Unigram(), trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>"),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), "▁")]),
        pre_tokenizers.Metaspace("▁", prepend_scheme="always"),
    )  # fmt: skip


def across_spaces():
    """Pieces may span several words: nothing can be looked up."""
    special = ["<pad>", "</s>", "<unk>"]
    return trained(
        models.Unigram(), trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>"),
        normalizers.NFKC(), pre_tokenizers.Metaspace("▁", split=False),
    )  # fmt: skip


def bytes_with_spaces():
    """A word's first piece holds the space before it."""
    return trained(
        models.BPE(), trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"]),
        None, pre_tokenizers.ByteLevel(add_prefix_space=False),
    )  # fmt: skip


TOKENIZERS = {
    "ours": raw_data.tiny_tokenizer(), "as t5": as_t5(), "across spaces": across_spaces(), "bytes": bytes_with_spaces(),
}  # fmt: skip
ODD = [
    "\u0301",
    "´",
    "e\u0301",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "\xa0",
    "\u2028",
    "\x1c",
    "</s>",
    "<extra_id_0>",
    "▁",
    "ﬁ",
    "½",
    "",
    "－",
]
pieces = st.sampled_from([*" ".join(raw_data.sentences(30)).split(), *ODD]) | st.text(max_size=4)


def split(ids, lengths) -> list[list[int]]:
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(lengths) else []


def whole(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    texts=st.lists(
        st.lists(pieces, max_size=8).flatmap(
            lambda words: st.sampled_from([" ", "", "\n", "  "]).map(lambda gap: gap.join(words))
        ),
        max_size=4,
    ),
    room=st.sampled_from([0, 10**6]),
)
@settings(max_examples=60)
def test_as_the_tokenizer_itself(name, texts, room):
    cache = WordCache(TOKENIZERS[name], room)
    expected = whole(TOKENIZERS[name], texts) if texts else []
    assert split(*cache(texts)) == expected
    assert split(*cache(texts)) == expected  # from memory


@pytest.mark.parametrize("name", ["ours", "as t5"])
def test_a_word_is_tokenised_once(name, monkeypatch):
    cache, texts = WordCache(TOKENIZERS[name]), raw_data.sentences(20)
    expected, tokenised, by_itself = whole(TOKENIZERS[name], texts), [], cache._encode
    monkeypatch.setattr(cache, "_encode", lambda given, **how: tokenised.extend(given) or by_itself(given, **how))
    assert split(*cache(texts)) == expected
    distinct = set(" ".join(texts).split())
    times = sum(len(one if isinstance(one, list) else one.split()) for one in tokenised)
    assert times < 2.5 * len(distinct)  # alone, and beside one another
    tokenised.clear()
    assert split(*cache(texts)) == expected
    assert tokenised == []


def test_pieces_across_spaces_are_kept():
    cache = WordCache(TOKENIZERS["across spaces"])
    texts = raw_data.sentences(20)
    assert split(*cache(texts)) == whole(TOKENIZERS["across spaces"], texts)
    assert not cache.cuts_at_spaces and not cache.row_of
