"""What the patched Switch Transformers does beyond stock, or where stock fails."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stock_switch import PLAIN, batch, build, ours, same, switch_settings
from transformers import AutoModelForSeq2SeqLM

few = settings(max_examples=15)
seeds = st.integers(0, 10_000)


def pad(data, inputs, targets):
    """The same batch with more padding on the right."""
    return {
        "input_ids": torch.nn.functional.pad(data["input_ids"], (0, inputs)),
        "attention_mask": torch.nn.functional.pad(data["attention_mask"], (0, inputs)),
        "labels": torch.nn.functional.pad(data["labels"], (0, targets), value=-100),
    }


def router_loss(model, outputs, encoder_mask=None, decoder_mask=None):
    """The weighted router losses of both stacks; none of a stack whose blocks are all sparse, as in stock."""
    total = 0.0
    for stack, mask in (("encoder", encoder_mask), ("decoder", decoder_mask)):
        if getattr(model.config, f"{stack}_sparse_step") > 1:
            z_loss, balance = ours.router_losses(outputs[f"{stack}_router_logits"], mask)
            total += model.config.router_z_loss_coef * z_loss + model.config.router_aux_loss_coef * balance
    return torch.as_tensor(total)


@few
@given(switch_settings(), seeds)
def test_router_loss_is_what_forward_adds(config, seed):
    model, data = build(ours, config, seed), batch(seed)
    outputs = model(**data)
    entropy = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), data["labels"].flatten())
    same(router_loss(model, outputs), outputs.loss - entropy)


@few
@given(switch_settings(), seeds, st.integers(0, 5), st.integers(0, 5))
def test_masked_router_loss_ignores_padding(config, seed, inputs, targets):
    model, data = build(ours, config, seed), batch(seed)
    losses = []
    for one in (data, pad(data, inputs, targets)):
        outputs = model(**one)
        losses.append(router_loss(model, outputs, one["attention_mask"], one["labels"] != -100))
    same(*losses)


def test_masked_router_losses_of_a_batch_are_those_of_its_rows():
    model, data = build(ours, PLAIN | {"expert_capacity": 64}), batch(7)
    outputs = model(**data)
    mask = data["attention_mask"]
    z_loss, balance = ours.router_losses(outputs.encoder_router_logits, mask)
    rows = []
    for ids, one in zip(data["input_ids"], mask, strict=True):
        alone = model(input_ids=ids[one.bool()].unsqueeze(0), labels=data["labels"][:1])
        rows.append(ours.router_losses(alone.encoder_router_logits))
    lengths = mask.sum(dim=-1).float()
    same(z_loss, (torch.stack([row[0] for row in rows]) * lengths).sum() / lengths.sum())
    same(balance, torch.stack([row[1] for row in rows]).mean())
    everything = ours.router_losses(outputs.encoder_router_logits, torch.ones_like(mask))
    same(everything, ours.router_losses(outputs.encoder_router_logits))


def test_router_losses_need_a_sparse_layer():
    with pytest.raises(ValueError, match="dense"):
        ours.router_losses([(torch.zeros(1),)])


@pytest.mark.parametrize("reentrant", [None, True, False])
@few
@given(config=switch_settings(), seed=seeds)
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, config, seed):
    plain, checkpointed, data = build(ours, config, seed), build(ours, config, seed), batch(seed)
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    losses = []
    for model in (plain, checkpointed):
        torch.manual_seed(seed)
        losses.append(model.train()(**data, use_cache=False).loss)
        losses[-1].backward()
    same(losses[1], losses[0])
    same(*({name: p.grad for name, p in model.named_parameters()} for model in (checkpointed, plain)))


def test_training_is_deterministic():
    results = []
    for _ in range(2):
        model = build(ours, PLAIN).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(0)
        for step in range(3):
            optimizer.zero_grad()
            model(**batch(step)).loss.backward()
            optimizer.step()
        results.append(model.state_dict())
    same(*results, 0)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_to_bfloat16(training):
    model, data = build(ours, PLAIN).train(training), batch(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**data)
    outputs.loss.backward()
    assert model.shared.weight.grad.isfinite().all()
    if not training:
        same(outputs.logits.float(), model(**data).logits, 0.1)


def test_over_capacity_tokens_leave_as_probability_times_input():
    torch.manual_seed(0)
    layer = ours.SwitchTransformersSparseMLP(ours.SwitchTransformersConfig(**PLAIN | {"expert_capacity": 1})).eval()
    states = torch.randn(1, 1, 12).expand(2, 4, 12)  # all to one expert, which takes the first of each sequence
    out, (logits, index) = layer(states)
    probability = logits.softmax(-1).amax(-1, keepdim=True)
    expert = layer.experts[f"expert_{int(index[0, 0])}"]
    same(out[:, :1], probability[:, :1] * expert(states[:, :1]))
    same(out[:, 1:], probability[:, 1:] * states[:, 1:])
    assert not index[:, 1:].any()


def test_head_pruning_survives_a_folder(tmp_path):
    model, data = build(ours, PLAIN, kind="EncoderModel"), batch(0)
    call = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
    mask = torch.ones(4, 3)
    mask[0, 1] = mask[2, 0] = mask[2, 2] = 0
    expected = model(**call, head_mask=mask).last_hidden_state
    model.prune_heads({0: [1], 2: [0, 2]})
    same(model(**call).last_hidden_state, expected)
    model.save_pretrained(tmp_path)
    same(ours.SwitchTransformersEncoderModel.from_pretrained(tmp_path).eval()(**call).last_hidden_state, expected)
    both = build(ours, PLAIN)
    both.prune_heads({1: [0]})
    assert both.encoder.block[1].layer[0].SelfAttention.n_heads == 2
    assert both.decoder.block[1].layer[0].SelfAttention.n_heads == 3


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(tmp_path, tied):
    model, data = build(ours, PLAIN | {"tie_word_embeddings": tied}), batch(0)
    before = model(**data).logits
    model.resize_token_embeddings(45)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert (model.lm_head.weight is model.shared.weight) == tied
    same(model(**data).logits[..., :40], before)
    model.save_pretrained(tmp_path)
    same(AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()(**data), model(**data))


def test_separate_embeddings_keep_apart_and_scale(tmp_path):
    settings_ = PLAIN | {"tie_word_embeddings": False, "separate_embeddings": True}
    model, data = build(ours, settings_), batch(0)
    parts = [model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head]
    assert len({part.weight.data_ptr() for part in parts}) == 4
    model.save_pretrained(tmp_path)
    loaded = ours.SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path).eval()
    same(loaded.state_dict(), model.state_dict(), 0)
    same(loaded(**data), model(**data))
    with pytest.raises(ValueError, match="separate_embeddings"):
        model.resize_token_embeddings(50)


def test_dense_stacks_and_wrong_input():
    dense = build(ours, PLAIN | {"num_sparse_encoder_layers": 9, "num_sparse_decoder_layers": 9})
    assert not any(".experts." in name for name in dense.state_dict())
    assert dense.expert_usage()["encoder"].shape == (0, 4)
    assert dense(**batch(0)).loss.isfinite()
    with pytest.raises(ValueError, match="decoder_input_ids"):
        dense(input_ids=torch.tensor([[3]]))
    with pytest.raises(ValueError, match="encoder"):
        dense.encoder(input_ids=torch.tensor([[3]]), use_cache=True)
