"""WEMoE of T5 and Switch Transformers: causal, blind to padding, the same cached or not, and what it is at its corners."""

import copy

import pytest
import torch
from static_wemoe import export_seq2seq
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

from expert_merging.core.safetensors_folder import SafetensorsFolder
from expert_merging.merging.task_arithmetic import task_arithmetic
from expert_merging.wemoe import checkpoints, seq2seq
from expert_merging.wemoe.ffn import ensembles, routers

KINDS = ("t5", "t5-gated", "switch")


def new(kind, seed):
    torch.manual_seed(seed)
    common = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "dropout_rate": 0.0}
    common |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "switch":
        config = SwitchTransformersConfig(
            **common, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
            num_experts=4, expert_capacity=8,
        )  # fmt: skip
        return SwitchTransformersForConditionalGeneration(config).eval()
    more = {"feed_forward_proj": "gated-gelu"} if kind == "t5-gated" else {}
    return T5ForConditionalGeneration(T5Config(**common, num_layers=2, **more)).eval()


def tuned(kind, model, seed):
    """The model with other weights, not far from its own."""
    made, other = copy.deepcopy(model), new(kind, seed)
    with torch.no_grad():
        for parameter, far in zip(made.parameters(), other.parameters(), strict=True):
            parameter.add_(far - parameter, alpha=0.3)
    return made


def upscaled(kind, **settings):
    """(base, experts, up-scaled model with routers that tell inputs apart)."""
    base = new(kind, 0)
    experts = [tuned(kind, base, seed) for seed in (1, 2, 3)]
    model = seq2seq.upscale(base, experts, **settings).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for router in routers(model):
            for parameter in router.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return base, experts, model


def batch(seed=0, rows=3, inputs=9, targets=7):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 32, (rows, inputs), generator=generator)
    return ids, torch.randint(2, 32, (rows, targets), generator=generator)


def logits(model, ids, targets, mask=None):
    with torch.no_grad():
        mask = torch.ones_like(ids) if mask is None else mask
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=targets, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"prune": 0.5, "share_router": True}])
def test_later_tokens_change_nothing_before_them(kind, settings):
    """Invariant 17."""
    *_, model = upscaled(kind, **settings)
    ids, targets = batch()
    whole = logits(model, ids, targets)
    for t in range(1, targets.shape[1]):
        changed = targets.clone()
        changed[:, t:] = (changed[:, t:] + 5) % 30 + 2
        again = logits(model, ids, changed)
        assert (again[:, :t] - whole[:, :t]).abs().max() <= 1e-5
        assert (again[:, t:] - whole[:, t:]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    """Invariant 17."""
    *_, model = upscaled(kind)
    ids, targets = batch()
    whole = logits(model, ids, targets)
    padded = torch.nn.functional.pad(ids, (0, 6))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 6))
    assert (logits(model, padded, targets, mask) - whole).abs().max() <= 1e-5
    with_tail = torch.nn.functional.pad(targets, (0, 4))
    assert (logits(model, padded, with_tail, mask)[:, :7] - whole).abs().max() <= 1e-5
    # And the mask does matter: without it the padding has a say.
    assert (logits(model, padded, targets) - whole).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", ["sample", "batch"])
def test_cached_decoding_is_the_full_pass(kind, routing):
    """Invariant 17."""
    *_, model = upscaled(kind, routing=routing)
    ids, targets = batch()
    whole = logits(model, ids, targets)
    with torch.no_grad():
        encoded = model.get_encoder()(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True)
        cache, steps = None, []
        for t in range(targets.shape[1]):
            out = model(
                encoder_outputs=encoded, attention_mask=torch.ones_like(ids), decoder_input_ids=targets[:, t : t + 1],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = out.past_key_values
            steps.append(out.logits)
    assert (torch.cat(steps, dim=1) - whole).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_beams_is_that_of_the_merged_model_of_each_sample(kind):
    """Each row's beams are those of the plain model with that row's weights, whatever shares its batch."""
    *_, model = upscaled(kind)
    ids, _ = batch(rows=3)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    settings = {"num_beams": 3, "max_length": 8, "min_length": 8, "do_sample": False}
    together = model.generate(input_ids=ids, attention_mask=mask, **settings)
    again = model.generate(input_ids=ids.flip(0), attention_mask=mask.flip(0), **settings)
    assert torch.equal(together, again.flip(0))  # nothing of the earlier batch is left
    for row in range(3):
        logits(model, ids[row : row + 1], ids[row : row + 1], mask[row : row + 1])
        own = {name: weights[0] for name, weights in seq2seq.routing_weights(model).items()}
        plain = export_seq2seq(model, own)
        one = plain.generate(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], **settings)
        assert torch.equal(one[0], together[row])


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_see_each_other(kind):
    *_, model = upscaled(kind)
    ids, targets = batch(rows=4)
    whole = logits(model, ids, targets)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(logits(model, ids[order], targets[order]), whole[order], rtol=1e-5, atol=1e-5)
    for row in range(4):
        alone = logits(model, ids[row : row + 1], targets[row : row + 1])
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=1e-5, atol=1e-5)
    *_, reduced = upscaled(kind, routing="batch")
    assert (logits(reduced, ids, targets)[:1] - logits(reduced, ids[:1], targets[:1])).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_constant_routers_are_task_arithmetic_and_can_be_exported(kind, tmp_path):
    base = new(kind, 0)
    experts = [tuned(kind, base, seed) for seed in (1, 2, 3)]
    before = [{n: t.clone() for n, t in one.state_dict().items()} for one in (base, *experts)]
    for number, one in enumerate((base, *experts)):
        one.save_pretrained(tmp_path / str(number))
    folders = [SafetensorsFolder(tmp_path / str(number)) for number in range(4)]
    plain = new(kind, 5)
    merged = dict(task_arithmetic(folders[0], folders[1:], 0.3))
    plain.load_state_dict(seq2seq.with_tied_names(merged, plain))
    ids, targets = batch()
    for sources in (experts, folders[1:]):
        model = seq2seq.upscale(base, sources, depth=0, routing="static").eval()
        torch.testing.assert_close(logits(model, ids, targets), logits(plain, ids, targets), rtol=1e-5, atol=1e-5)
        exported = export_seq2seq(model)
        torch.testing.assert_close(logits(exported, ids, targets), logits(model, ids, targets), rtol=0, atol=1e-6)
        exported.save_pretrained(tmp_path / "exported")
        again = type(base).from_pretrained(tmp_path / "exported").eval()
        assert torch.equal(logits(again, ids, targets), logits(exported, ids, targets))
    for one, copy_ in zip((base, *experts), before, strict=True):
        assert all(torch.equal(one.state_dict()[n], copy_[n]) for n in copy_)


@pytest.mark.parametrize("kind", KINDS)
def test_one_task_alone_gives_its_own_layers(kind):
    base, experts, model = upscaled(kind)
    with torch.no_grad():
        for router in routers(model):
            for parameter in router.parameters():
                parameter.zero_()
            router.bias[1] = 1.0
    ids, targets = batch()
    logits(model, ids, targets)
    made = experts[1].state_dict()
    for name, layer in ensembles(model):
        for parameter, tensor in layer.merged_parameters(layer.last_weights[0]).items():
            torch.testing.assert_close(tensor, made[f"{name}.{parameter}"], rtol=1e-5, atol=1e-6)


def test_every_layer_sparse_or_dense_is_one():
    *_, model = upscaled("switch")
    names = [name for name, _ in ensembles(model)]
    assert names == [f"{s}.block.{i}.layer.{j}.mlp" for s, j in (("encoder", 1), ("decoder", 2)) for i in (0, 1)]
    assert len(model.encoder.routers()) == 1 and model.expert_usage()["encoder"].shape == (1, 4)  # Switch's own routers


def test_a_copy_routes_by_itself():
    *_, model = upscaled("t5")
    other = copy.deepcopy(model)
    ids, targets = batch()
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    whole = logits(other, ids, targets)
    logits(model, ids, targets, mask)
    assert all(layer.token_mask.sum() == 27 for _, layer in ensembles(other.get_encoder()))
    assert torch.equal(logits(other, ids, targets), whole)


def test_saved_and_loaded(tmp_path):
    base, _, model = upscaled("switch", prune=0.9, share_router=True)
    checkpoints.save(model, tmp_path / "model")
    ids, targets = batch()
    again = seq2seq.route(checkpoints.load(base, tmp_path / "model")).eval()
    torch.testing.assert_close(logits(again, ids, targets), logits(model, ids, targets), rtol=0, atol=1e-6)


def test_what_has_no_decoder_is_refused():
    with pytest.raises(ValueError, match="no encoder and decoder"):
        seq2seq.route(torch.nn.Linear(2, 2))
    *_, model = upscaled("t5")
    with pytest.raises(ValueError, match="give encoder_hidden_states"):
        model.get_decoder()(input_ids=torch.tensor([[0]]))


def test_beams_may_share_the_encoders_states():
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    if switch.CAEM_PATCH == "1":
        pytest.skip("the installed patch is from before beams could share states; run: python caem_files/install.py")
    from transformers import GenerationConfig

    from expert_merging.switch.beam_search import beam_search

    for routing in ("sample", "batch"):
        *_, model = upscaled("switch", routing=routing)
        ids, _ = batch(rows=4)
        mask = torch.ones_like(ids)
        ids[1, 5:], mask[1, 5:] = 0, 0
        settings = GenerationConfig(
            num_beams=3, max_length=8, early_stopping=True, do_sample=False, length_penalty=1.0, repetition_penalty=1.2,
            no_repeat_ngram_size=3, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        with torch.inference_mode():
            ours = beam_search(model, ids, mask, settings)
            theirs = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        assert ours == [[token for i, token in enumerate(row) if i == 0 or token > 1] for row in theirs.tolist()]
