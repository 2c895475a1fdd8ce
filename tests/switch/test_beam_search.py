"""The beam search gives what transformers' own gives one example at a time, counts included, however it is batched."""

import contextlib

import pytest
import stock_switch  # noqa: F401  skips where transformers is not patched
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.generation import NoRepeatNGramLogitsProcessor
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)

from expert_merging.meo.switch import merged_experts
from expert_merging.switch.beam_search import beam_search, forbid_repeated_ngrams

END = 1


def random_model(seed: int, vocabulary: int, factor: float):
    """A tiny model that ends some of its sentences early; sharper with a larger factor.

    In double precision, routers too: else rounding decides between hypotheses that are as good as equal.
    """
    torch.manual_seed(seed)
    config = SwitchTransformersConfig(
        vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, expert_capacity=6, pad_token_id=0,
        eos_token_id=END, decoder_start_token_id=0, initializer_factor=factor,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config).eval().double()
    for module in model.modules():
        if isinstance(module, SwitchTransformersTop1Router):
            module.dtype = torch.float64
    return model


def batch_of(lengths: list[int], vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, vocabulary, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return ids * mask, mask.long()


def one_by_one(model, ids, mask, chosen: GenerationConfig) -> list[list[int]]:
    """By transformers, up to </s>."""
    written = []
    for row, length in zip(ids, mask.sum(dim=1).tolist(), strict=True):
        tokens = model.generate(input_ids=row[None, :length], generation_config=chosen)[0].tolist()
        written.append(tokens[: tokens.index(END)] if END in tokens else tokens)
    return written


@given(
    seed=st.integers(0, 10**6), vocabulary=st.sampled_from([12, 30, 150]), factor=st.sampled_from([1.0, 1.5, 3.0]),
    beams=st.integers(2, 4), max_length=st.integers(2, 14), repetition_penalty=st.sampled_from([1.0, 1.2, 2.0]),
    ngram=st.integers(0, 3), length_penalty=st.sampled_from([1.0, 0.5, 2.0, -1.0]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
)  # fmt: skip
@settings(max_examples=15)
def test_as_transformers_does(
    seed, vocabulary, factor, beams, max_length, repetition_penalty, ngram, length_penalty, lengths
):
    model = random_model(seed, vocabulary, factor)
    ids, mask = batch_of(lengths, vocabulary)
    chosen = GenerationConfig(
        num_beams=beams, max_length=max_length, repetition_penalty=repetition_penalty, no_repeat_ngram_size=ngram,
        length_penalty=length_penalty, early_stopping=True, decoder_start_token_id=0, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    model.set_usage_counting("paper")
    with torch.inference_mode():
        theirs, their_usage = one_by_one(model, ids, mask, chosen), model.expert_usage()
        model.reset_expert_usage()
        assert beam_search(model, ids, mask, chosen) == theirs
    for stack, counts in model.expert_usage().items():
        assert torch.equal(counts, their_usage[stack])


def three_beams(max_length: int) -> GenerationConfig:
    return GenerationConfig(
        num_beams=3, max_length=max_length, repetition_penalty=1.2, no_repeat_ngram_size=3, early_stopping=True,
        decoder_start_token_id=0, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip


@pytest.mark.parametrize("merged", [False, True], ids=["switch", "experts merged for each sequence"])
def test_sentences_end_and_examples_leave_early(monkeypatch, merged):
    """That the comparison above is not of sentences that all run to the limit, and that the batch shrinks; also where a
    layer keeps something of each row."""
    model = random_model(3, 12, 3.0)
    ids, mask = batch_of([5] * 12, 12)
    chosen = three_beams(30)
    rows, forward = [], model.decoder.forward
    monkeypatch.setattr(
        model.decoder, "forward", lambda **given: rows.append(len(given["input_ids"])) or forward(**given)
    )
    with torch.inference_mode(), merged_experts(model, 2) if merged else contextlib.nullcontext():
        found = beam_search(model, ids, mask, chosen)
        monkeypatch.undo()
        assert found == one_by_one(model, ids, mask, chosen)
    assert len(set(map(len, found))) > 2 and min(map(len, found)) < 10
    assert rows[0] == 36 and rows == sorted(rows, reverse=True) and 3 <= rows[-1] < 36


def test_the_host_waits_for_the_device_once_a_step(monkeypatch):
    model = random_model(3, 30, 1.0)
    ids, mask = batch_of([5] * 8, 30)
    chosen = three_beams(12)
    waits, steps, forward = [], [], model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda **given: steps.append(None) or forward(**given))
    for name in ("tolist", "item"):
        wait = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, wait=wait: waits.append(None) or wait(tensor))
    monkeypatch.setattr(SwitchTransformersSparseMLP, "forward", lambda layer, states: (states, (None, None)))
    with torch.inference_mode():
        beam_search(model, ids, mask, chosen)
    assert len(steps) > 5 and len(waits) <= len(steps) + 1 + len(ids)  # at the end, the answers


@given(
    tokens=st.integers(1, 8).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    size=st.integers(1, 4),
)
def test_forbidden_ngrams_as_transformers_has_them(tokens, size):
    tokens = torch.tensor(tokens)
    scores = torch.randn(len(tokens), 5)
    expected = NoRepeatNGramLogitsProcessor(size)(tokens, scores)
    assert torch.equal(forbid_repeated_ngrams(scores, tokens, size), expected)
    assert torch.equal(forbid_repeated_ngrams(scores, tokens, 0), scores)


@pytest.mark.parametrize("cached", [False, True])
def test_rows_that_share_the_encoders_states(cached):
    """Cross-attention over states given once for two rows each, against the same states given to each row."""
    from transformers import DynamicCache, EncoderDecoderCache

    model = random_model(0, 30, 1.5)
    ids, mask = batch_of([7, 4, 5], 30)
    given_tokens = torch.randint(2, 30, (6, 4))
    with torch.inference_mode():
        states = model.encoder(ids, mask).last_hidden_state
        logits = []
        for repeats in (1, 2):
            encoded, seen = (states.repeat_interleave(repeats, 0),), mask.repeat_interleave(repeats, 0)
            cache, steps = EncoderDecoderCache(DynamicCache(), DynamicCache()) if cached else None, []
            for step in given_tokens.split(1 if cached else 4, dim=1):
                steps.append(
                    model(
                        encoder_outputs=encoded, attention_mask=seen, decoder_input_ids=step, past_key_values=cache,
                        use_cache=cached,
                    ).logits
                )  # fmt: skip
            logits.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(logits[0], logits[1])
