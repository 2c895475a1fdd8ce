"""The fast ways of the patched Switch Transformers, which models as small as the other tests' do not take by themselves."""

import contextlib
import copy
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from stock_switch import PLAIN, batch, build, cpu_kernels, needs_stock, ours, same, stock, switch_settings

few = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 10_000)


def fast():
    """Every float32 product, and attention, takes the way of the large ones on a Zen 5."""
    return mock.patch.multiple(cpu_kernels, PRODUCT_FROM=1, ATTEND_FROM=1, ONEDNN=True, BY_HEAD=True)


onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize(
    ("processor", "capability", "gains"),
    [
        (("AuthenticAMD", 26), "AVX512", (True, True)),
        (("AuthenticAMD", 25), "AVX512", (True, False)),
        (("AuthenticAMD", 25), "AVX2", (False, False)),  # Zen 3, which has no more, and Zen 4 told to use no more
        (("GenuineIntel", 6), "AVX512", (False, False)),
        (("", 0), "DEFAULT", (False, False)),
    ],
)
def test_which_kernels_are_used_where(processor, capability, gains):
    assert cpu_kernels.gains(*processor, capability) == gains


def test_a_processor_told_to_use_avx2_gets_no_kernel():
    code = "from transformers.models.switch_transformers import cpu_kernels as c; print(c.ONEDNN or c.BY_HEAD)"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@onednn
@needs_stock
@few
@given(switch_settings(), seeds, st.booleans(), st.integers(1, 12), st.integers(1, 9))
def test_large_products_give_stocks_outputs_and_gradients(config, seed, training, inputs, targets):
    config["dropout_rate"] = 0.0  # which weights drop is drawn otherwise than in stock
    a, b = build(ours, config, seed), build(stock, config, seed)
    a.load_state_dict(b.state_dict())
    data, outputs = batch(seed, inputs=inputs, targets=targets), []
    for model in (a, b):
        model.train(training)
        torch.manual_seed(seed)
        with fast():
            output = model(**data, output_hidden_states=True)
            output.loss.backward()
        outputs.append(output)
    same(*outputs)
    same(*({name: p.grad for name, p in model.named_parameters()} for model in (a, b)))


@onednn
@needs_stock
@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3, "no_repeat_ngram_size": 3, "early_stopping": True}])
def test_large_products_generate_alike(decoding):
    a, b = build(ours, PLAIN), build(stock, PLAIN)
    a.load_state_dict(b.state_dict())
    data = batch(0)
    call = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"], "max_length": 14} | decoding
    with fast():
        made = a.generate(**call)
    assert torch.equal(made, b.generate(**call))


@onednn
@pytest.mark.parametrize("reentrant", [True, False])
def test_large_products_under_gradient_checkpointing(reentrant):
    """Dropout draws alike when a block is computed again."""
    losses, models = [], [build(ours, PLAIN | {"dropout_rate": 0.3}) for _ in range(2)]
    models[1].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for model in models:
        torch.manual_seed(0)
        with fast():
            losses.append(model.train()(**batch(0), use_cache=False).loss)
            losses[-1].backward()
    same(losses[1], losses[0])
    same(*({name: p.grad for name, p in model.named_parameters()} for model in reversed(models)))


@onednn
def test_pruned_heads_and_autocast_with_large_products():
    model, data = build(ours, PLAIN, kind="EncoderModel"), batch(0)
    model.prune_heads({0: [1], 2: [0, 2]})
    call = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
    expected = model(**call).last_hidden_state
    with fast():
        same(model(**call).last_hidden_state, expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same(model(**call).last_hidden_state.float(), expected, 0.1)


def attention_inputs(seed, rows, heads, queries, keys, masked, biased):
    rng = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(rows, heads, size, 4, generator=rng) for size in (queries, keys, keys))
    bias = torch.randn(1, heads, queries, keys, generator=rng) if biased else None
    mask = None
    if masked:
        mask = torch.rand(rows, 1, queries, keys, generator=rng).lt(0.4).float() * torch.finfo(torch.float32).min
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, bias) if tensor is not None]
    return query, key, value, bias, mask, leaves


sizes = st.integers(1, 4)


@onednn
@few
@given(seeds, sizes, sizes, sizes, sizes, st.booleans(), st.booleans(), st.sampled_from([0.0, 0.4]))
def test_attention_on_the_cpu_is_its_formula(seed, rows, heads, queries, keys, masked, biased, dropout):
    query, key, value, bias, mask, leaves = attention_inputs(seed, rows, heads, queries, keys, masked, biased)
    weights = ours._attention_weights(query, key, bias, mask)
    kept = torch.ones_like(weights)
    torch.manual_seed(seed)
    if dropout:
        drawn = int(torch.randint(2**62, ()))
        for row, head, _, one in cpu_kernels._weights_by_head(query, key, bias, mask, dropout, drawn):
            assert all(x in (0.0, pytest.approx(1 / (1 - dropout))) for x in one.unique().tolist())
            kept[row, head] = one
    given_ = torch.randn(rows, heads, queries, 4)
    expected = (weights * kept) @ value
    wanted = torch.autograd.grad(expected, leaves, given_)

    torch.manual_seed(seed)
    made = cpu_kernels.Attend.apply(query, key, value, bias, mask, dropout)
    same(made, expected)
    same(torch.autograd.grad(made, leaves, given_), wanted)


@onednn
def test_attention_drops_as_many_weights_as_asked():
    query = torch.zeros(2, 3, 50, 4)
    torch.manual_seed(0)
    made = cpu_kernels.Attend.apply(query, query, torch.ones_like(query), None, None, 0.25)
    assert made.mean().item() == pytest.approx(1.0, abs=0.02)  # mean of 15,000 weights, kept with 3/4, times 4/3
    assert made.std().item() == pytest.approx((1 / 3 / 50) ** 0.5, rel=0.2)


@onednn
def test_attention_keeps_memory_linear_in_the_length():
    def kept(length):
        query, key, value, _, _, _ = attention_inputs(0, 2, 3, length, length, False, False)
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            cpu_kernels.Attend.apply(query, key, value, None, None, 0.0)
        return sum(numbers)

    assert kept(64) == 2 * kept(32) > 0


@contextlib.contextmanager
def as_on_a_gpu():
    """The way of GPUs with grouped products, with torch's kernels for CPUs."""
    with mock.patch.object(torch.Tensor, "is_cuda", True), mock.patch.object(ours, "_has_grouped_products", bool):
        yield


@few
@given(switch_settings(), seeds, st.booleans())
def test_attention_as_on_a_gpu(config, seed, training):
    config["dropout_rate"] = 0.0
    models, outputs = [build(ours, config, seed) for _ in range(2)], []
    for model, way in zip(models, (as_on_a_gpu, contextlib.nullcontext), strict=True):
        torch.manual_seed(seed)
        with way():
            output = model.train(training)(**batch(seed))
        output.loss.backward()
        outputs.append(output)
    same(*outputs, 1e-4)  # other kernels round otherwise, and layers and capacities make more of it
    same(*({name: p.grad for name, p in model.named_parameters()} for model in models), 1e-4)


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3, "early_stopping": True}])
def test_generation_as_on_a_gpu(decoding):
    model, data = build(ours, PLAIN), batch(0)
    call = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"], "max_length": 14} | decoding
    expected = model.generate(**call)
    with as_on_a_gpu():
        assert torch.equal(model.generate(**call), expected)


def test_pruned_heads_as_on_a_gpu():
    model, data = build(ours, PLAIN, kind="EncoderModel"), batch(0)
    model.prune_heads({0: [1], 2: [0, 2]})
    call = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
    expected = model(**call).last_hidden_state
    with as_on_a_gpu():
        same(model(**call).last_hidden_state, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_lowest_number_of_a_mask_stays_finite_on_gpus(dtype):
    bias = torch.full((1, 2, 3, 3), -40.0)
    for lowest in (torch.finfo(torch.float32).min, torch.finfo(dtype).min):
        assert ours._bias_with_mask(bias, torch.full((1, 1, 1, 3), lowest), dtype).isfinite().all()
    assert ours._bias_with_mask(None, None, dtype) is None


@few
@given(
    st.integers(1, 30), st.integers(1, 6), st.sampled_from(["relu", "gelu_new"]),
    st.sampled_from([torch.float32, torch.bfloat16]), seeds,
)  # fmt: skip
def test_experts_at_once_are_the_experts_one_by_one(number, experts, act, dtype, seed):
    """As on a GPU, but for the kernel: also where some experts, or tokens, have nothing to do."""
    torch.manual_seed(seed)
    config = ours.SwitchTransformersConfig(**PLAIN | {"num_experts": experts, "dense_act_fn": act, "d_model": 16})
    layer = ours.SwitchTransformersSparseMLP(config).eval().to(dtype)
    chosen = torch.randint(experts + 1, (number,))  # `experts` stands for none
    tokens = torch.randn(number, 16, dtype=dtype, requires_grad=True)
    order, sizes_ = chosen.argsort(stable=True), torch.bincount(chosen, minlength=experts + 1)[:experts]
    served = (chosen < experts).unsqueeze(-1)
    made = torch.where(served, layer._run_experts_at_once(tokens, order, sizes_), tokens)
    expected = tokens.clone()
    for i, expert in enumerate(layer.experts.values()):
        expected = torch.where((chosen == i).unsqueeze(-1), expert(tokens), expected)
    same(made, expected, 1e-5 if dtype == torch.float32 else 0.05)
    leaves = [tokens, *(p for expert in layer.experts.values() for p in expert.parameters())]
    given_ = torch.randn_like(made)
    found, wanted = (torch.autograd.grad(one, leaves, given_) for one in (made, expected))
    for a, b in zip(found, wanted, strict=True):
        assert a.isfinite().all()
        same(a, b, 1e-4 if dtype == torch.float32 else 0.1 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("training", [True, False])
def test_sparse_layer_at_once_is_the_sparse_layer(training):
    """The whole layer, with tokens beyond capacity, by the way of GPUs."""
    torch.manual_seed(0)
    layer = ours.SwitchTransformersSparseMLP(
        ours.SwitchTransformersConfig(**PLAIN | {"expert_capacity": 2, "d_model": 16})
    )
    layer = layer.train(training).to(torch.bfloat16)
    layer.router.jitter_noise, states = 0.0, torch.randn(3, 9, 16).to(torch.bfloat16)
    for expert in layer.experts.values():
        expert.dropout.p = 0.0
    expected = layer(states)
    one_by_one = mock.Mock(side_effect=AssertionError("one by one"))
    with as_on_a_gpu(), mock.patch.object(layer, "_run_experts", one_by_one):
        made = layer(states)
    same(made[0].float(), expected[0].float(), 0.02)
    same(made[1], expected[1])


def test_quantised_or_adapted_experts_run_one_by_one():
    assert not ours.SwitchTransformersSparseMLP(ours.SwitchTransformersConfig(**PLAIN))._alike()  # 12 is not 8 n
    layer = ours.SwitchTransformersSparseMLP(ours.SwitchTransformersConfig(**PLAIN | {"d_model": 16}))
    assert layer._alike()
    layer.experts["expert_1"].wi = torch.nn.Sequential(layer.experts["expert_1"].wi)
    assert not layer._alike()


@onednn
def test_large_linear_layers_in_float32_only_go_by_onednn():
    layer, states = cpu_kernels.Linear(6, 4, bias=False), torch.randn(2, 3, 6)
    with fast(), mock.patch.object(cpu_kernels, "product", side_effect=AssertionError("oneDNN")):
        with pytest.raises(AssertionError, match="oneDNN"):
            layer(states)
        same(layer(states[:0]), F.linear(states[:0], layer.weight))
        half = layer.to(torch.bfloat16)
        same(half(states.bfloat16()), F.linear(states.bfloat16(), half.weight))


@onednn
@few
@given(seeds, st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans())
def test_any_models_linear_layers_compute_the_same_by_onednn(seed, inputs, outputs, biased, frozen):
    """Of the neighbours' models: with biases, and with weights that LoRA leaves as they are."""
    torch.manual_seed(seed)
    plain = torch.nn.Sequential(
        torch.nn.Linear(inputs, outputs, bias=biased), torch.nn.Tanh(), torch.nn.Linear(outputs, 3)
    )
    plain[0].weight.requires_grad_(not frozen)
    ours_, states, made = cpu_kernels.use_in(copy.deepcopy(plain)), torch.randn(2, 4, inputs, requires_grad=True), []
    assert ours_.state_dict().keys() == plain.state_dict().keys() and type(plain[0]) is torch.nn.Linear
    for model in (ours_, plain):
        with fast():
            out = model(states)
            made.append(
                [
                    out,
                    *torch.autograd.grad(
                        out.square().sum(), [states, *(p for p in model.parameters() if p.requires_grad)]
                    ),
                ]
            )
    same(*made)


CAPABILITIES = [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)]


@pytest.mark.parametrize(("capability", "grouped"), CAPABILITIES)
def test_grouped_products_only_where_the_gpu_has_them(capability, grouped):
    with mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability):
        assert ours._has_grouped_products.__wrapped__(torch.device("cuda", 0)) == grouped
    layer = ours.SwitchTransformersSparseMLP(ours.SwitchTransformersConfig(**PLAIN | {"d_model": 16})).bfloat16()
    way = mock.Mock(side_effect=AssertionError("at once"))
    with as_on_a_gpu(), mock.patch.object(layer, "_run_experts_at_once", way):
        with mock.patch.object(ours, "_has_grouped_products", lambda device: grouped):
            with pytest.raises(AssertionError, match="at once") if grouped else contextlib.nullcontext():
                layer(torch.randn(2, 5, 16).bfloat16())


@few
@given(switch_settings(), seeds, st.booleans())
def test_the_router_keeps_its_precision_under_autocast(config, seed, training):
    """Its choices and probabilities are those of a router in float32 on the same states."""
    torch.manual_seed(seed)
    config = ours.SwitchTransformersConfig(**config | {"router_jitter_noise": 0.0})
    router = ours.SwitchTransformersTop1Router(config).train(training)
    for dtype in (torch.float32, torch.bfloat16):
        states = torch.randn(3, 9, config.d_model).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            chosen, probability, logits = router(states)
        wanted = router(states.float())
        assert logits.dtype == torch.float32 and torch.equal(logits, wanted[2])
        assert torch.equal(chosen, wanted[0]) and torch.equal(probability, wanted[1].to(dtype))


def test_the_router_computes_in_bf16_where_its_dtype_says_so():
    router = ours.SwitchTransformersTop1Router(ours.SwitchTransformersConfig(**PLAIN, router_dtype="bfloat16"))
    with torch.autocast("cpu", torch.bfloat16):
        assert router(torch.randn(2, 5, 12))[2].dtype == torch.bfloat16
