"""Our Switch Transformers against the stock one: same weights, same numbers."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stock_switch import PLAIN, batch, build, needs_stock, ours, same, stock, switch_settings
from transformers import DynamicCache, EncoderDecoderCache

pytestmark = needs_stock
few = settings(max_examples=12)
seeds = st.integers(0, 10_000)


def pair(config, seed=0, kind="ForConditionalGeneration"):
    a, b = build(ours, config, seed, kind), build(stock, config, seed, kind)
    a.load_state_dict(b.state_dict())
    return a, b


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def test_public_names_and_signatures():
    for name, value in vars(stock).items():
        if name.startswith("_") or getattr(value, "__module__", stock.__name__) != stock.__name__:
            continue
        if not (name.startswith(("Switch", "SWITCH")) or inspect.isfunction(value)):
            continue
        assert hasattr(ours, name), name
        mine = getattr(ours, name)
        for method in ("__init__", "forward"):
            if inspect.isclass(value) and method in vars(value):
                assert list(inspect.signature(getattr(mine, method)).parameters) == list(
                    inspect.signature(getattr(value, method)).parameters
                ), (name, method)


@few
@given(switch_settings(), st.sampled_from(["ForConditionalGeneration", "Model", "EncoderModel"]), seeds)
def test_a_seed_gives_the_same_initial_weights(config, kind, seed):
    config["router_bias"] = False  # ours starts at zero; stock leaves it as nn.Linear has it
    same(build(ours, config, seed, kind).state_dict(), build(stock, config, seed, kind).state_dict(), 0)


@few
@given(switch_settings(), seeds, st.booleans(), st.integers(1, 12), st.integers(1, 9))
def test_forward_loss_and_gradients(config, seed, training, inputs, targets):
    a, b = pair(config, seed)
    data = batch(seed, inputs=inputs, targets=targets)
    outputs = []
    for model in (a, b):
        model.train(training)
        torch.manual_seed(seed)  # jitter and dropout must draw alike
        output = model(**data, output_attentions=True, output_hidden_states=True)
        output.loss.backward()
        outputs.append(output)
    same(*outputs)
    same(gradients(a), gradients(b))


@few
@given(switch_settings(), seeds, st.booleans(), st.booleans())
def test_tuples_embeddings_and_head_masks(config, seed, with_router_logits, with_labels):
    a, b = pair(config, seed)
    data = batch(seed)
    torch.manual_seed(seed)
    heads = config["num_heads"]
    embeddings = a.shared(data["input_ids"]).detach()
    call = {
        "inputs_embeds": embeddings,
        "attention_mask": data["attention_mask"],
        "head_mask": torch.rand(config["num_layers"], heads),
        "decoder_head_mask": torch.rand(config["num_decoder_layers"], heads),
        "cross_attn_head_mask": torch.rand(config["num_decoder_layers"], heads),
        "decoder_input_ids": data["labels"].clamp(min=0),
        "decoder_attention_mask": data["labels"].ne(-100).long(),
        "labels": data["labels"] if with_labels else None,
        "output_router_logits": with_router_logits,
        "output_attentions": True,
        "return_dict": False,
    }
    same(a(**call), b(**call))


@pytest.mark.parametrize("kind", ["Model", "EncoderModel"])
@few
@given(config=switch_settings(), seed=seeds, return_dict=st.booleans(), router_logits=st.booleans())
def test_models_without_a_head(kind, config, seed, return_dict, router_logits):
    a, b = pair(config, seed, kind)
    data = batch(seed)
    call = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"], "return_dict": return_dict}
    call |= {"output_hidden_states": True, "output_attentions": True, "output_router_logits": router_logits}
    if kind == "Model":
        call["decoder_input_ids"] = data["labels"].clamp(min=0)
    same(a(**call), b(**call))


@few
@given(switch_settings(), seeds, st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_is_bit_for_bit_stock(config, seed, dtype):
    a, b = pair(config, seed)
    a, b = a.to(dtype), b.to(dtype)
    same(a(**batch(seed)), b(**batch(seed)), 0)
    same(a.state_dict(), b.state_dict(), 0)  # the router goes to float32 in both


@pytest.mark.parametrize("given_cache", ["none", "dynamic", "both"])
def test_caches(given_cache):
    a, b = pair(PLAIN)
    data = batch(0)
    both = lambda: EncoderDecoderCache(DynamicCache(), DynamicCache())  # noqa: E731
    caches = {"none": lambda: None, "dynamic": DynamicCache, "both": both}
    outputs = []
    for model in (a, b):
        call = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
        first = model(**call, decoder_input_ids=torch.tensor([[0, 5]] * 3), past_key_values=caches[given_cache]())
        second = model(**call, decoder_input_ids=torch.tensor([[7]] * 3), past_key_values=first.past_key_values)
        outputs.append((first, second))
    same(*outputs)


GENERATION = {
    "greedy": {},
    "without cache": {"use_cache": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "early_stopping": True},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "beam groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constrained beams": {"num_beams": 3, "force_words_ids": [[5]]},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
    "several": {"num_beams": 3, "num_return_sequences": 2},
    "decoder prompt": {"decoder_input_ids": torch.tensor([[0, 6, 7]] * 3)},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("name", GENERATION)
@pytest.mark.parametrize("seed", [0, 1])
def test_generation(name, seed):
    a, b = pair(PLAIN, seed)
    data = batch(seed)
    one_row = name == "prompt lookup"  # assisted decoding is for one sequence
    call = {key: data[key][: 1 if one_row else None] for key in ("input_ids", "attention_mask")} | GENERATION[name]
    call |= {"max_length": 12, "return_dict_in_generate": True, "output_attentions": True, "output_scores": True}
    call["output_hidden_states"] = True
    outputs = []
    for model in (a, b):
        torch.manual_seed(seed)
        outputs.append(model.generate(**call))
    same(*outputs)


def test_assisted_generation():
    a, b = pair(PLAIN, 3)
    helper = build(ours, PLAIN, 4)
    data = batch(3, rows=1)
    call = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"], "max_length": 15}
    plain = b.generate(**call)
    assert torch.equal(a.generate(**call, assistant_model=helper), plain)
    same(b.generate(**call, assistant_model=helper), plain)


@pytest.mark.parametrize("tied", [True, False])
def test_folders_load_in_both_directions(tmp_path, tied):
    a, b = pair(PLAIN | {"tie_word_embeddings": tied}, 5)
    data = batch(5)
    for saver, loader in ((a, stock), (b, ours), (a, ours)):
        saver.save_pretrained(tmp_path)
        loaded, report = loader.SwitchTransformersForConditionalGeneration.from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert not report["unexpected_keys"] and not report["mismatched_keys"]
        if loader is ours or tied:  # stock loses the embedding of its own untied folders
            same(loaded.eval()(**data), saver(**data))


def test_config_fields_and_defaults():
    assert ours.SwitchTransformersConfig().to_dict() == stock.SwitchTransformersConfig().to_dict()
    hub = {"encoder_sparse_step": 2, "num_sparse_encoder_layers": 6, "num_decoder_layers": None, "d_ff": 3072}
    assert ours.SwitchTransformersConfig(**hub).to_dict() == stock.SwitchTransformersConfig(**hub).to_dict()
    with pytest.raises(ValueError, match="router_dtype"):
        ours.SwitchTransformersConfig(router_dtype="int8")


@few
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), seeds)
def test_loss_functions(rows, tokens, experts, seed):
    torch.manual_seed(seed)
    logits = torch.randn(rows, tokens, experts)
    indices = torch.randint(experts, (rows, tokens))
    same(ours.router_z_loss_func(logits), stock.router_z_loss_func(logits))
    probs = logits.softmax(-1)
    for one in (indices, indices.int(), indices.unsqueeze(-1)):
        same(ours.load_balancing_loss_func(probs, one), stock.load_balancing_loss_func(probs, one))


@few
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.booleans(), seeds)
def test_router_and_sparse_layer(rows, tokens, capacity, experts, training, seed):
    config = {**PLAIN, "expert_capacity": capacity, "num_experts": experts}
    torch.manual_seed(seed)
    a = ours.SwitchTransformersSparseMLP(ours.SwitchTransformersConfig(**config)).train(training)
    b = stock.SwitchTransformersSparseMLP(stock.SwitchTransformersConfig(**config)).train(training)
    b.load_state_dict(a.state_dict())
    states = torch.randn(rows, tokens, 12)
    for mine, theirs in ((a.router, b.router), (a, b)):
        results = []
        for module in (mine, theirs):
            torch.manual_seed(seed)
            results.append(module(states.clone()))
        same(*results, 1e-6)
