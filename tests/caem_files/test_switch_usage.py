"""Counting of expert usage: what counts, and that counts do not depend on how examples are batched."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stock_switch import PLAIN, batch, build, ours, switch_settings

few = settings(max_examples=15)
seeds = st.integers(0, 10_000)


def counted(model, reading="paper", **call):
    model.set_usage_counting(reading)
    model.reset_expert_usage()
    with torch.no_grad():
        model(**call)
    return model.expert_usage()


def chosen(router_outputs):
    """Most probable expert, before the capacity cut, of each sparse layer: [layers, batch, tokens]."""
    return torch.stack([output[0].argmax(dim=-1) for output in router_outputs if output[0].dim() > 1])


def histogram(choices, real, experts):
    return torch.stack([torch.bincount(layer[real], minlength=experts) for layer in choices])


@few
@given(switch_settings(), seeds)
def test_paper_counts_real_tokens_before_the_cut(config, seed):
    model, data = build(ours, config, seed), batch(seed)
    usage = counted(model, **data)
    outputs = model(**data)
    real = data["attention_mask"].bool(), data["labels"] != -100
    n = config["num_experts"]
    assert torch.equal(usage["encoder"], histogram(chosen(outputs.encoder_router_logits), real[0], n))
    assert torch.equal(usage["decoder"], histogram(chosen(outputs.decoder_router_logits), real[1], n))


@few
@given(switch_settings(), seeds)
def test_released_counts_all_positions_after_the_cut(config, seed):
    model, data = build(ours, config, seed), batch(seed)
    usage = counted(model, "released", **data)
    outputs = model(**data)
    n, capacity = config["num_experts"], config["expert_capacity"]
    for stack in ("encoder", "decoder"):
        layers = chosen(outputs[f"{stack}_router_logits"])
        kept = [sum(torch.bincount(row, minlength=n).clamp(max=capacity) for row in layer) for layer in layers]
        assert torch.equal(usage[stack], torch.stack(kept))


def test_until_asked_it_counts_in_evaluation_as_the_released_code_does():
    model, data = build(ours, PLAIN), batch(0)
    model.train()(**data)
    assert not any(counts.any() for counts in model.expert_usage().values())
    model.eval()(**data)
    unasked = model.expert_usage()
    assert unasked["encoder"].sum() > data["attention_mask"].sum()  # padding, too
    for stack, counts in counted(model, "released", **data).items():
        assert torch.equal(counts, unasked[stack])


def test_it_adds_up_and_resets():
    model, data = build(ours, PLAIN), batch(0)
    once = counted(model, **data)
    model(**data)
    assert torch.equal(model.expert_usage()["encoder"], 2 * once["encoder"])
    model.set_usage_counting(None)
    model(**data)
    router = model.decoder.block[1].layer[-1].mlp.router
    assert torch.equal(router.get_expert_usage_counts(), 2 * once["decoder"][0])
    router.reset_expert_usage_counts()
    assert not model.expert_usage()["decoder"][0].any() and model.expert_usage()["decoder"][1].any()
    with pytest.raises(ValueError, match="reading"):
        model.set_usage_counting("tokens")


def test_counts_are_no_part_of_the_state_dict_and_survive_casts():
    model = build(ours, PLAIN).to(torch.bfloat16)
    counted(model, **batch(0))
    assert not any("usage" in name for name in model.state_dict())
    assert model.expert_usage()["encoder"].dtype == torch.int64
    copied = copy.deepcopy(model)
    copied.reset_expert_usage()
    assert model.expert_usage()["encoder"].any()


def test_counting_changes_no_output():
    model, data = build(ours, PLAIN), batch(1)
    plain = model(**data).logits
    model.set_usage_counting("paper")
    assert torch.equal(model(**data).logits, plain)


def test_without_mask_padding_is_told_by_its_token():
    model, data = build(ours, PLAIN), batch(2)
    with_mask = counted(model, **data)
    without = counted(model, input_ids=data["input_ids"], labels=data["labels"])
    assert without["encoder"].sum() == with_mask["encoder"].sum()
    embeddings = model.shared(data["input_ids"]).detach()
    everything = counted(model, inputs_embeds=embeddings, labels=data["labels"])
    assert everything["encoder"].sum() == 2 * data["input_ids"].numel()


def test_decoder_tokens():
    model, data = build(ours, PLAIN), batch(3)
    labels = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100], [9, 9, 9, 9]])
    call = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
    by_labels = counted(model, **call, labels=labels)["decoder"]
    assert by_labels.sum(dim=-1).tolist() == [10, 10]
    # Fed without labels, the same tokens count: the start, what is no padding and no end of sequence.
    fed = model.prepare_decoder_input_ids_from_labels(labels)
    assert torch.equal(counted(model, **call, decoder_input_ids=fed)["decoder"], by_labels)
    # A mask that says something has the word; one of ones is no more than the default.
    ones, two = torch.ones_like(labels), (torch.arange(4) < 2).long().expand(3, 4)
    assert torch.equal(counted(model, **call, labels=labels, decoder_attention_mask=ones)["decoder"], by_labels)
    assert counted(model, **call, labels=labels, decoder_attention_mask=two)["decoder"].sum() == 2 * 6


def test_gradient_checkpointing_counts_once():
    model, data = build(ours, PLAIN | {"dropout_rate": 0.0, "router_jitter_noise": 0.0}), batch(4)
    expected = counted(model, **data)
    model.train()
    model.gradient_checkpointing_enable()
    model.reset_expert_usage()
    model(**data).loss.backward()
    for stack, counts in model.expert_usage().items():
        assert torch.equal(counts, expected[stack])


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3, "early_stopping": True}], ids=["greedy", "beams"])
@pytest.mark.parametrize("seed", range(4))
def test_generation_counts_the_same_in_a_batch_and_one_by_one(decoding, seed):
    model, data = build(ours, PLAIN | {"expert_capacity": 64}, seed), batch(seed, rows=5)
    with torch.no_grad():
        model.shared.weight[1] += 0.25 * model.shared.weight.std()  # so that some end early
    call = {"max_length": 14, **decoding}
    model.set_usage_counting("paper")
    together = model.generate(input_ids=data["input_ids"], attention_mask=data["attention_mask"], **call)
    usage = model.expert_usage()

    model.reset_expert_usage()
    lengths = []
    for ids, mask in zip(data["input_ids"], data["attention_mask"], strict=True):
        ids = ids[mask.bool()].unsqueeze(0)
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **call)
        lengths.append(alone.shape[1])
        assert torch.equal(together[len(lengths) - 1, : alone.shape[1]], alone[0])
    assert torch.equal(model.expert_usage()["encoder"], usage["encoder"])
    assert usage["encoder"].sum(dim=-1).tolist() == [int(data["attention_mask"].sum())] * 2
    assert torch.equal(model.expert_usage()["decoder"], usage["decoder"])
    if not decoding:
        fed = (together[:, :-1] != 0) & (together[:, :-1] != 1)
        assert usage["decoder"].sum(dim=-1).tolist() == [int(fed.sum()) + len(together)] * 2


def test_encoder_alone_and_a_stack_alone():
    encoder, data = build(ours, PLAIN, kind="EncoderModel"), batch(5)
    usage = counted(encoder, input_ids=data["input_ids"], attention_mask=data["attention_mask"])
    assert list(usage) == ["encoder"] and usage["encoder"].sum() == 2 * data["attention_mask"].sum()
    assert torch.equal(encoder.get_encoder().expert_usage()["encoder"], usage["encoder"])
