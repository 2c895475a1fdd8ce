"""What causal mixtures write: cached as uncached, in any batch, and which tokens are counted meanwhile."""

from pathlib import Path

import pytest
import torch
from causal_models import FAMILIES, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_data import constants
from transformers import AutoModelForCausalLM

from expert_merging.causal.decoding import answers, settings_of
from expert_merging.training import families

END, LONGEST = 0, 7
INPUTS = [[5, 6, 7, 8, 9, 10, 11], [40], [15, 16, 17], [60, 61, 62, 63, 64], [90, 17]]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    model = families.load_model(write_model(tmp_path_factory.mktemp("causal") / request.param, request.param), "folder")
    with torch.no_grad():  # or such a model would hardly ever end a text
        model.lm_head.weight[END] *= 3
    return model.eval()


def write(model, inputs, **changed) -> list[list[int]]:
    plain = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "max_decoder_length": LONGEST}
    rows = [torch.tensor(ids) for ids in inputs]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=changed.pop("pad", 3))
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.inference_mode():
        return answers(model, settings_of(constants(Path(), Path(), **{**plain, **changed}), END), ids, mask)


@torch.no_grad()
def greedily(model, ids: list[int]) -> list[int]:
    """The whole sequence anew for every token."""
    written: list[int] = []
    while len(written) < LONGEST:
        token = model(torch.tensor([ids + written])).logits[0, -1].argmax().item()
        if token == END:
            break
        written.append(token)
    return written


@torch.no_grad()
def by_beams(model, ids: list[int], beams: int) -> list[int]:
    """Transformers' search, whose only start is the input; without penalties, which it would take to the input."""
    output = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), num_beams=beams, max_new_tokens=LONGEST,
        early_stopping=True, do_sample=False, eos_token_id=END, pad_token_id=END, length_penalty=1.0,
    )  # fmt: skip
    written = output[0, len(ids) :].tolist()
    return written[: written.index(END)] if END in written else written


def test_greedy_with_a_cache_is_greedy_without(model):
    expected = [greedily(model, ids) for ids in INPUTS]
    assert len(set(map(len, expected))) > 1  # some end before others
    assert write(model, INPUTS) == expected and write(model, INPUTS, pad=8) == expected
    assert [write(model, [ids])[0] for ids in INPUTS] == expected


def test_beams_are_those_of_transformers(model):
    assert write(model, INPUTS, num_beams=3) == [by_beams(model, ids, 3) for ids in INPUTS]


def test_any_batch_gives_the_same(model):
    alone = {tuple(ids): write(model, [ids], num_beams=2)[0] for ids in INPUTS}

    @settings(max_examples=20)
    @given(st.lists(st.sampled_from(INPUTS), min_size=1, max_size=6))
    def property_of_batches(batch):
        assert write(model, batch, num_beams=2) == [alone[tuple(ids)] for ids in batch]

    property_of_batches()


def test_penalties_look_at_what_is_written_only(model):
    """An input may be repeated; what has been written may not."""
    for ids, free in zip(INPUTS, write(model, INPUTS), strict=True):
        asked = write(model, [[*free, *ids]], no_repeat_ngram_size=2)[0]
        pairs = list(zip(asked, asked[1:], strict=False))
        assert len(set(pairs)) == len(pairs)
        assert write(model, [ids], no_repeat_ngram_size=LONGEST + 1)[0] == free


def test_counts_are_those_of_a_loop_over_tokens(model):
    """Every token that is read counts, k choices in each sparse layer: the input, and what is written but for the last
    token, behind which nothing is asked; what shares the batch with an unfinished text does not."""
    routers = model.routers
    routers.counting = True
    routers.reset()
    texts = write(model, INPUTS)
    found = routers.counts()
    routers.counting = False
    stock = AutoModelForCausalLM.from_pretrained(model.name_or_path).eval()
    expected, tokens = torch.zeros_like(found), 0
    for ids, text in zip(INPUTS, texts, strict=True):
        read = ids + (text if len(text) < LONGEST else text[:-1])
        tokens += len(read)
        with torch.no_grad():
            layers = stock(torch.tensor([read]), output_router_logits=True).router_logits
        for layer, logits in enumerate(layers):
            for token in logits.tolist():
                for expert in sorted(range(len(token)), key=token.__getitem__)[-2:]:
                    expected[layer, expert] += 1
    assert torch.equal(found, expected) and found.sum(1).tolist() == [2 * tokens] * len(found)


def test_beams_count_each_and_read_the_input_once(model):
    routers = model.routers
    routers.counting = True
    totals = {}
    for beams in (1, 3):
        routers.reset()
        write(model, INPUTS, num_beams=beams, max_decoder_length=1)
        totals[beams] = routers.counts().sum(1).tolist()
    routers.counting = False
    assert totals[1] == totals[3] == [2 * sum(map(len, INPUTS))] * len(routers.layers)
