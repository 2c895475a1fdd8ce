"""WEMoE and E-WEMoE on tiny CLIP, T5 and Switch models: what must hold for any weights.

The method's invariants are numbered: 1 to 12 and 18 are here; 4, of trained models, and 13 to 15 in test_wemoe_adaptation.py;
16 in test_merging_methods.py; 17 in test_wemoe_seq2seq.py.
"""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from static_wemoe import export_static
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SwitchTransformersConfig,
    T5Config,
)

from expert_merging.core.errors import UserError
from expert_merging.merging.task_arithmetic import task_arithmetic
from expert_merging.wemoe import checkpoints
from expert_merging.wemoe.ffn import (
    WeightEnsemblingFFN,
    ensembles,
    routers,
    upscale,
)
from expert_merging.wemoe.router import Router
from expert_merging.wemoe.vectors import DenseVectors, SparseVectors, held_bytes, prune_magnitude

TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def perturbed(model: nn.Module, size: float = 0.1) -> nn.Module:
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return made


def let_routers_differ(model: nn.Module, size: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for router in routers(model):
            for parameter in router.parameters():
                parameter.add_(size * torch.randn_like(parameter))
    return model


@pytest.fixture()
def clip():
    """(pre-trained, three fine-tuned, pixels)."""
    torch.manual_seed(0)
    base = CLIPVisionModel(CLIPVisionConfig(**TINY)).eval()
    return base, [perturbed(base) for _ in range(3)], torch.randn(5, 3, 8, 8)


class Mlp(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.wi, self.wo = nn.Linear(16, 32, bias=bias), nn.Linear(32, 16, bias=bias)

    def forward(self, states):
        return self.wo(self.wi(states).relu())


def layer_of(base: nn.Module, experts: list[nn.Module], depth: int = 2, hidden: int = 16, **more):
    vectors = [
        {n: e.get_parameter(n).detach() - p.detach() for n, p in base.named_parameters()} for e in experts
    ]  # fmt: skip
    return WeightEnsemblingFFN(base, vectors, Router(hidden, len(experts), depth), **more)


@pytest.fixture()
def mlps():
    torch.manual_seed(0)
    base = Mlp()
    return base, [perturbed(base) for _ in range(3)], torch.randn(4, 7, 16)


# -- a layer: what the weights mean (1, 2, 3, 4)


@pytest.mark.parametrize("form", ["merge", "product", "loop"])
def test_one_hot_weights_give_each_expert_and_zeros_the_base(mlps, form):
    """Invariant 1, in every way to compute."""
    base, experts, states = mlps
    layer = layer_of(base, experts)
    layer.form = form
    layer.given_weights = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    made = layer(states)
    for i, expert in enumerate([*experts, base]):
        torch.testing.assert_close(made[i : i + 1], expert(states[i : i + 1]), atol=1e-5, rtol=0)


def says(router: Router, weights: torch.Tensor) -> None:
    """Let a router give these weights for any input."""
    with torch.no_grad():
        router.bias.copy_(weights)
        if router.depth:
            router.weight.zero_()


@pytest.mark.parametrize("routing", ["sample", "batch"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_one_hot_router_is_its_expert(mlps, depth, routing):
    """Invariant 1, of the router itself."""
    base, experts, states = mlps
    layer = layer_of(base, experts, depth, routing=routing)
    for i, expert in enumerate(experts):
        says(layer.gate, torch.eye(3)[i])
        torch.testing.assert_close(layer(states), expert(states), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("routing", ["sample", "batch"])
def test_a_router_of_zeros_is_the_base_exactly(mlps, routing, sparse):
    """Invariant 2. By sample the weights are the base's exactly, too; products of one sample each round otherwise."""
    base, experts, states = mlps
    for depth in (0, 1, 2):
        layer = layer_of(base, experts, depth, routing=routing, sparse=sparse)
        says(layer.gate, torch.zeros(3))
        made = layer(states)
        for name, tensor in layer.merged_parameters(layer.last_weights[0]).items():
            assert torch.equal(tensor, base.get_parameter(name))
        if len(layer.last_weights) == 1:
            assert torch.equal(made, base(states))
        else:
            torch.testing.assert_close(made, base(states), atol=1e-6, rtol=0)
            layer.form = "loop"
            assert torch.equal(layer(states), torch.cat([base(one) for one in states.split(1)]))


def test_constant_weights_are_task_arithmetic(clip):
    """Invariant 3, of each layer and of the whole model."""
    base, experts, pixels = clip
    expected = copy.deepcopy(base)
    state = dict(task_arithmetic(base.state_dict(), [expert.state_dict() for expert in experts], 0.3))
    expected.load_state_dict(state)
    made = upscale(base, experts, lam=0.3)
    with torch.no_grad():
        for router in routers(made):
            router.weight.zero_()
    torch.testing.assert_close(made(pixels)[0], expected(pixels)[0], atol=1e-5, rtol=0)
    states = torch.randn(4, 5, 16)
    for name, layer in ensembles(made):
        torch.testing.assert_close(layer(states), expected.get_submodule(name)(states), atol=1e-5, rtol=0)


def test_new_routers_stay_near_lambda(clip):
    """Invariant 4, on what decides it, the weights themselves; of accuracy see test_wemoe_adaptation.py."""
    base, experts, pixels = clip
    made = upscale(base, experts, lam=0.3)
    made(pixels)
    weights = torch.stack([layer.last_weights for _, layer in ensembles(made)])
    assert 0 < (weights - 0.3).abs().mean() < 0.02


# -- routing (5, 6, 7, 8)


@pytest.mark.parametrize("routing", ["static", "sample", "batch"])
def test_routers_of_depth_0_do_not_look_and_export_to_the_same_model(clip, routing):
    """Invariant 5."""
    base, experts, pixels = clip
    made = let_routers_differ(upscale(base, experts, depth=0, routing=routing))
    used = []
    for images in (pixels, 2 * pixels.flip(0)):
        made(images)
        used.append(torch.stack([layer.last_weights for _, layer in ensembles(made)]))
    assert torch.equal(*used) and used[0].shape == (2, 1, 3)
    plain = export_static(made)
    assert torch.equal(plain(pixels)[0], made(pixels)[0])
    assert {type(m) for m in plain.modules()} == {type(m) for m in base.modules()}
    assert plain.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(made(pixels)[0][:2], made(pixels[:2])[0], atol=1e-6, rtol=0)


def test_export_of_routed_layers_needs_weights(clip):
    base, experts, pixels = clip
    made = upscale(base, experts)
    with pytest.raises(ValueError, match="give the weights"):
        export_static(made)
    plain = export_static(made, torch.tensor([1.0, 0, 0]))
    expert = experts[0].get_submodule("vision_model.encoder.layers.1.mlp")
    torch.testing.assert_close(plain.get_submodule("vision_model.encoder.layers.1.mlp").fc1.weight, expert.fc1.weight)


def test_one_sample_is_routed_alike_by_sample_and_by_batch(clip):
    """Invariant 6."""
    base, experts, pixels = clip
    by_sample = let_routers_differ(upscale(base, experts))
    by_batch = copy.deepcopy(by_sample)
    for _, layer in ensembles(by_batch):
        layer.routing = "batch"
    assert torch.equal(by_sample(pixels[:1])[0], by_batch(pixels[:1])[0])


def test_sample_wise_routing_does_not_see_the_batch_and_batch_routing_does(clip):
    """Invariant 7."""
    base, experts, pixels = clip
    made = let_routers_differ(upscale(base, experts))
    order = torch.tensor([3, 0, 4, 1, 2])
    whole = made(pixels)[0]
    torch.testing.assert_close(made(pixels[order])[0], whole[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(made(pixels[:2])[0], whole[:2], atol=1e-5, rtol=0)
    for _, layer in ensembles(made):
        layer.routing = "batch"
    assert (made(pixels[:2])[0] - made(pixels)[0][:2]).abs().max() > 1e-3


@pytest.mark.parametrize("prune", [0.0, 0.9])
def test_all_ways_to_compute_agree_in_values_and_gradients(clip, prune):
    """Invariant 8: single samples, merged weights of all samples at once, and T + 1 products."""
    base, experts, pixels = clip
    made = let_routers_differ(upscale(base, experts, prune=prune))
    found = {}
    for form in ("loop", "merge", "product"):
        for _, layer in ensembles(made):
            layer.form = form
        made.zero_grad()
        states = made(pixels)[0]
        states.square().mean().backward()
        found[form] = [states.detach(), *(p.grad.clone() for p in made.parameters() if p.requires_grad)]
    for form in ("merge", "product"):
        for a, b in zip(found[form], found["loop"], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_large_products_agree_with_single_samples():
    """At sizes where a CPU goes by oneDNN, and in several pieces of rows."""
    torch.manual_seed(0)
    base = Mlp()
    base.wi, base.wo = nn.Linear(256, 1000), nn.Linear(1000, 256)
    experts = [perturbed(base, 0.02) for _ in range(3)]
    states, weights = torch.randn(20, 40, 256), torch.rand(20, 3)
    for sparse in (False, True):
        layer = layer_of(base, experts, hidden=256, sparse=sparse)
        layer.given_weights = weights
        made = layer(states)
        layer.form = "loop"
        torch.testing.assert_close(made, layer(states), atol=1e-4, rtol=1e-4)


def test_the_gradients_are_those_of_finite_differences(mlps):
    base, experts, states = mlps
    layer = layer_of(base.double(), [expert.double() for expert in experts], sparse=True)
    weights = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    states = states.double().requires_grad_()

    def run(states, weights):
        layer.given_weights = weights
        return layer(states)

    for form in ("merge", "product", "loop"):
        layer.form = form
        assert torch.autograd.gradcheck(run, (states, weights), fast_mode=True)


def test_padding_has_no_say_in_the_routing(mlps):
    base, experts, states = mlps
    layer = layer_of(base, experts)
    with torch.no_grad():
        layer.gate.weight.normal_()
    short = layer(states[:, :5])
    padded = states.clone()
    padded[:, 5:] = 100 * torch.randn(4, 2, 16)
    layer.token_mask = torch.arange(7).expand(4, 7) < 5
    torch.testing.assert_close(layer(padded)[:, :5], short, atol=1e-5, rtol=0)
    layer.token_mask = None
    assert (layer(padded)[:, :5] - short).abs().max() > 1e-2


def test_wrong_input_is_refused(mlps):
    base, experts, states = mlps
    layer = layer_of(base, experts)
    with pytest.raises(ValueError, match=r"\[batch, tokens, hidden\]"):
        layer(states[0])
    layer.given_weights = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="3 rows of routing weights for 4 samples"):
        layer(states)
    with pytest.raises(ValueError, match="routing is"):
        layer_of(base, experts, routing="token")
    with pytest.raises(ValueError, match="depth 0"):
        layer_of(base, experts, routing="static")
    with pytest.raises(ValueError, match="depth of a router"):
        Router(16, 3, 3)


# -- pruning and sparse task vectors (9)

TENSORS = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.booleans())


def tensor_of(drawn) -> torch.Tensor:
    rows, columns, seed, ties = drawn
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return made.sign() if ties else made


@given(TENSORS, st.floats(0, 1), st.floats(0, 1))
def test_pruning_keeps_exactly_k_nested_and_idempotent(drawn, ratio, other):
    """Invariant 9, of a tensor; the released code's way is compared with fusion-bench below."""
    tensor = tensor_of(drawn)
    low, high = sorted((ratio, other))
    fewer, more = prune_magnitude(tensor, high), prune_magnitude(tensor, low)
    assert fewer.count_nonzero() == tensor.numel() - round(high * tensor.numel())
    assert not ((fewer != 0) & (more == 0)).any()
    assert torch.equal(prune_magnitude(fewer, high), fewer)
    assert torch.equal(prune_magnitude(tensor, 0), tensor)
    assert not prune_magnitude(tensor, 1).any()
    kept, dropped = tensor[fewer != 0].abs(), tensor[fewer == 0].abs()
    assert not len(kept) or not len(dropped) or kept.min() >= dropped.max()


def test_pruning_refuses_nonsense():
    for arguments in ((torch.ones(2), 1.5), (torch.ones(2), -0.1), (torch.ones(2), 0.5, "released")):
        with pytest.raises(ValueError):
            prune_magnitude(*arguments)


@pytest.mark.parametrize("shape", [(7,), (5, 3), (40, 70), (1, 1)])
def test_sparse_vectors_give_back_what_they_were_given(shape, monkeypatch):
    monkeypatch.setattr("expert_merging.wemoe.vectors.BLOCK_BYTES", 6 * 4 * 70)  # blocks of 6 rows: the last is shorter
    torch.manual_seed(0)
    given = [prune_magnitude(torch.randn(shape), 0.8) for _ in range(3)]
    sparse, dense = SparseVectors(given), DenseVectors(given)
    assert torch.equal(sparse.rows(0, shape[0]), dense.rows(0, shape[0]))
    for start in range(0, shape[0], sparse.block):
        for stop in {min(start + sparse.block, shape[0]), shape[0]}:
            assert torch.equal(sparse.rows(start, stop), dense.rows(start, stop))
    assert sparse.nonzeros() == [int(tensor.count_nonzero()) for tensor in given]


def test_unpruned_with_a_copied_router_is_wemoe_and_pruned_to_nothing_is_the_base(clip):
    """Invariant 9, of a model."""
    base, experts, pixels = clip
    shared = let_routers_differ(upscale(base, experts, share_router=True))
    own = upscale(base, experts)
    for router in routers(own):
        router.load_state_dict(routers(shared)[0].state_dict())
    assert torch.equal(shared(pixels)[0], own(pixels)[0])
    states = torch.randn(2, 5, 16)
    for name, layer in ensembles(upscale(base, experts, prune=1.0)):
        layer.given_weights = torch.full((2, 3), 7.0)
        torch.testing.assert_close(layer(states), base.get_submodule(name)(states), atol=1e-6, rtol=0)


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_every_pruned_tensor_has_exactly_k_elements(clip, ratio):
    """Invariant 9: n - round(s n) of each tensor of each task."""
    base, experts, _ = clip
    made = upscale(base, experts, prune=ratio)
    for name, layer in ensembles(made):
        for own, vectors in zip(layer.names, layer.vectors, strict=True):
            size = base.get_parameter(f"{name}.{own}").numel()
            assert vectors.nonzeros() == [size - round(ratio * size)] * 3


def test_sparse_means_fewer_bytes_in_memory_and_on_disk(tmp_path):
    torch.manual_seed(0)
    base = CLIPVisionModel(CLIPVisionConfig(**{**TINY, "hidden_size": 64, "intermediate_size": 256}))
    experts = [perturbed(base) for _ in range(4)]
    size, held = {}, {}
    for prune in (0.0, 0.9):
        made = upscale(base, experts, prune=prune, share_router=prune > 0)
        held[prune] = sum(held_bytes(layer.vectors) for _, layer in ensembles(made))
        size[prune] = checkpoints.save(made, tmp_path / str(prune))
    assert held[0.9] <= 0.21 * held[0.0]
    assert size[0.9]["task_vectors.safetensors"] <= 0.15 * size[0.0]["task_vectors.safetensors"]


# -- shared routers, counts, gradients (10, 11, 12)


def test_a_shared_router_is_one_and_its_gradient_the_sum_over_layers(clip):
    """Invariant 10."""
    base, experts, pixels = clip
    shared = let_routers_differ(upscale(base, experts, share_router=True))
    own = upscale(base, experts)
    assert len(routers(shared)) == 1 and len(routers(own)) == 2
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (shared, own)]
    assert trained == [16 * 16 + 16 + 16 * 3 + 3, 2 * (16 * 16 + 16 + 16 * 3 + 3)]
    for router in routers(own):
        router.load_state_dict(routers(shared)[0].state_dict())
    for model in (shared, own):
        model(pixels)[0].square().mean().backward()
    for name, parameter in routers(shared)[0].named_parameters():
        total = sum(router.get_parameter(name).grad for router in routers(own))
        torch.testing.assert_close(parameter.grad, total, atol=1e-6, rtol=1e-4)
    copied = copy.deepcopy(shared)
    assert len(routers(copied)) == 1


SIZES = {
    "B/32": ({"patch_size": 32}, 87_456_000, 7_160_928, 547_970_400, 596_744, 541_406_216, 133_388_091, 92_586_279),
    "B/16": ({"patch_size": 16}, 85_799_424, 7_160_928, 546_313_824, 596_744, 539_749_640, 131_731_515, 90_929_703),
    "L/14": (
        {"patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        303_179_776, 25_387_200, 1_940_162_752, 1_057_800, 1_915_833_352, 465_397_154, 320_353_534,
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_at_clips_sizes(size):
    """Invariant 11, without a weight in memory.

    Of E-WEMoE what is not zero follows from the shapes, an element or less a tensor off.
    """
    shape, whole, trained, total, trained_e, total_e, at_90, at_99 = SIZES[size]
    with torch.device("meta"):
        base = CLIPVisionModel(CLIPVisionConfig(**shape))
        experts = [base] * 8
        for share, expected in ((False, (trained, total)), (True, (trained_e, total_e))):
            made = upscale(base, experts, share_router=share)
            count = sum(p.numel() for p in made.parameters() if p.requires_grad)
            vectors = [v for _, layer in ensembles(made) for v in layer.vectors]
            assert count == expected[0]
            held = sum(v.values.numel() for v in vectors)
            assert sum(p.numel() for p in made.parameters()) + held == expected[1]
    assert sum(p.numel() for p in base.parameters()) == whole
    for ratio, expected in ((0.9, at_90), (0.99, at_99)):
        share = whole + trained_e + held - held * round(100 * ratio) // 100
        assert abs(share - expected) <= 1
        exactly = whole + trained_e + sum(len(v) * (n - round(ratio * n)) for v in vectors for n in [v.shape.numel()])
        assert abs(exactly - expected) <= sum(map(len, vectors))


def test_nothing_given_is_changed_and_only_routers_have_gradients(clip):
    """Invariant 12."""
    base, experts, pixels = clip
    before = [copy.deepcopy(model.state_dict()) for model in (base, *experts)]
    made = upscale(base, experts, prune=0.5)
    frozen = {n: t.clone() for n, t in made.state_dict().items() if ".gate." not in n}
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=0.1)
    made(pixels)[0].square().mean().backward()
    with_grad = {name for name, parameter in made.named_parameters() if parameter.grad is not None}
    assert with_grad and all(".gate." in name for name in with_grad)
    optimizer.step()
    for name, tensor in made.state_dict().items():
        assert ".gate." in name or torch.equal(tensor, frozen[name])
    for model, was in zip((base, *experts), before, strict=True):
        assert all(torch.equal(tensor, was[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not any(isinstance(module, WeightEnsemblingFFN) for module in model.modules())


def test_only_chosen_layers_are_up_scaled(clip):
    base, experts, _ = clip
    assert [n for n, _ in ensembles(upscale(base, experts, layers=[-1]))] == ["vision_model.encoder.layers.1.mlp"]
    with pytest.raises(ValueError, match="layer 2 is beyond the 2"):
        upscale(base, experts, layers=[2])
    with pytest.raises(ValueError, match="no module's name fits"):
        upscale(base, experts, select="nothing")


def test_experts_of_another_shape_are_refused(clip):
    base, experts, _ = clip
    with pytest.raises(ValueError, match="no expert"):
        upscale(base, [])
    state = experts[0].state_dict()
    name = next(name for name in state if "fc1.weight" in name)
    with pytest.raises(ValueError, match="is .* in the base and .* in expert 1"):
        upscale(base, [experts[0], {**state, name: torch.zeros(2, 2)}])
    with pytest.raises(ValueError, match="expert 0 has no tensor"):
        upscale(base, [{n: t for n, t in state.items() if n != name}])


# -- other modules: no biases, gates, tuples, dicts, Switch (18)


class Outputs(nn.Module):
    """Gives a dict with a tuple, and flattens what it gets, so that samples cannot be told apart inside."""

    def __init__(self):
        super().__init__()
        self.mlp = Mlp(bias=False)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, states, shift=0.0):
        made = self.mlp(states.flatten(0, 1)).view_as(states) * self.scale + shift
        return {"states": made, "more": (made.sum(dim=-1), "word")}


def test_any_module_and_any_output(mlps):
    """Invariant 18: a layer may give a tuple or a dict."""
    base = Outputs()
    experts = [perturbed(base) for _ in range(2)]
    layer = layer_of(base, experts)
    layer.given_weights = torch.tensor([[1.0, 0], [0, 1], [0, 0], [1, 0]])
    states = torch.randn(4, 7, 16)
    made = layer(states, shift=2.0)
    for i, model in enumerate([*experts, base, experts[0]]):
        expected = model(states[i : i + 1], shift=2.0)
        torch.testing.assert_close(made["states"][i : i + 1], expected["states"], atol=1e-5, rtol=0)
        torch.testing.assert_close(made["more"][0][i : i + 1], expected["more"][0], atol=1e-5, rtol=0)
    assert made["more"][1] == "word"


def test_a_module_that_flattens_its_input_falls_back_to_single_samples():
    torch.manual_seed(0)

    class Flat(Mlp):
        def forward(self, states):
            return super().forward(states.flatten(0, 1)).view_as(states)

    base = Flat()
    layer = layer_of(base, [perturbed(base) for _ in range(2)])
    layer.given_weights = torch.rand(4, 2)
    states = torch.randn(4, 7, 16)
    made = layer(states)
    layer.given_weights = layer.given_weights[:1]
    torch.testing.assert_close(made[:1], layer(states[:1]), atol=1e-5, rtol=0)


T5 = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


@pytest.mark.parametrize("gated", [False, True])
def test_t5_with_and_without_gate(gated):
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(0)
    kind = "gated-gelu" if gated else "relu"
    base = T5ForConditionalGeneration(T5Config(**T5, feed_forward_proj=kind)).eval()
    experts = [perturbed(base) for _ in range(2)]
    made = upscale(base, experts)
    assert len(list(ensembles(made))) == 4
    ids = torch.randint(2, 32, (3, 6))
    for _, layer in ensembles(made):
        layer.given_weights = torch.tensor([1.0, 0])
    mixed = copy.deepcopy(made)
    for _, layer in ensembles(mixed):
        layer.given_weights = torch.tensor([[1.0, 0]] * 3)
    a, b = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (made, mixed))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_switch_layers_with_their_experts_and_routers(world):
    from transformers import SwitchTransformersForConditionalGeneration

    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        **T5, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, expert_capacity=3,
    )  # fmt: skip
    base = SwitchTransformersForConditionalGeneration(config).eval()
    made = let_routers_differ(upscale(base, [perturbed(base) for _ in range(3)], depth=1))
    ids = torch.randint(2, 32, (4, 9))
    found = []
    for form in ("loop", None):
        for _, layer in ensembles(made):
            layer.form = form
        made.zero_grad()
        outputs = made(input_ids=ids, labels=ids, output_router_logits=True)
        outputs.loss.backward()
        found.append([outputs.logits.detach(), *(p.grad.clone() for p in made.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    plain = export_static(made, torch.tensor([0.3, 0.3, 0.3]))
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    if hasattr(made, "set_usage_counting"):  # the patched model: counters reach through
        made.set_usage_counting("paper")
        made(input_ids=ids, labels=ids)
        assert sum(int(n) for counts in made.expert_usage()["encoder"] for n in counts) > 0


def test_bfloat16_keeps_the_router_in_float32(clip):
    """Invariant 18."""
    base, experts, pixels = clip
    for prune in (0.0, 0.9):
        made = upscale(base, experts, prune=prune)
        half = copy.deepcopy(made).to(torch.bfloat16)
        states = half(pixels.bfloat16())[0]
        assert states.dtype == torch.bfloat16
        assert {p.dtype for router in routers(half) for p in router.parameters()} == {torch.float32}
        torch.testing.assert_close(states.float(), made(pixels)[0], atol=0.15, rtol=0.1)
        states.float().square().mean().backward()
        assert all(p.grad is not None for p in half.parameters() if p.requires_grad)


# -- on disk


@pytest.mark.parametrize("more", [{}, {"prune": 0.9, "share_router": True}, {"prune": 0.9, "compat": "reference"}])
def test_a_saved_model_comes_back_the_same(clip, tmp_path, more):
    base, experts, pixels = clip
    made = let_routers_differ(upscale(base, experts, **more))
    checkpoints.save(made, tmp_path / "saved")
    loaded = checkpoints.load(base, tmp_path / "saved")
    assert torch.equal(loaded(pixels)[0], made(pixels)[0])
    assert loaded.wemoe == made.wemoe
    with pytest.raises(UserError, match="another pre-trained model"):
        checkpoints.load(experts[0], tmp_path / "saved")


def test_routers_alone_go_only_where_they_belong(clip, tmp_path):
    base, experts, pixels = clip
    made = let_routers_differ(upscale(base, experts))
    checkpoints.save_routers(made, tmp_path / "routers.safetensors")
    again = upscale(base, experts)
    checkpoints.load_routers(again, tmp_path / "routers.safetensors")
    assert torch.equal(again(pixels)[0], made(pixels)[0])
    assert (tmp_path / "routers.safetensors").stat().st_size < 0.2 * sum(p.numel() * 4 for p in base.parameters())
    for other in (upscale(base, experts[::-1]), upscale(base, experts, depth=1), upscale(base, experts, layers=[0])):
        with pytest.raises(UserError, match="belongs to another model"):
            checkpoints.load_routers(other, tmp_path / "routers.safetensors")
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(UserError, match="holds no routers"):
        checkpoints.load_routers(made, tmp_path / "broken")


# -- against fusion-bench's classes


def test_a_layer_equals_fusion_bench(mlps):
    reference = pytest.importorskip("fusion_bench.models.we_moe", reason="fusion-bench is not installed")
    base, experts, states = mlps
    for depth in (0, 1, 2):
        for routing in ("sample", "batch"):
            theirs = reference.WeightEnsemblingMoE(
                16, copy.deepcopy(base), copy.deepcopy(experts), init_lambda=0.3, batch_first=True,
                router_hidden_layers=depth, batch_reduce=routing == "batch",
            )  # fmt: skip
            ours = layer_of(base, experts, depth, routing=routing)
            _same_router(theirs.gate, ours.gate)
            torch.testing.assert_close(ours(states), theirs(states), atol=1e-5, rtol=0)
            if depth:
                torch.testing.assert_close(ours.gate(states), theirs.gate(states), atol=1e-5, rtol=0)


def test_a_pruned_layer_equals_fusion_bench(mlps):
    reference = pytest.importorskip("fusion_bench.models.sparse_we_moe", reason="fusion-bench is not installed")
    base, experts, states = mlps
    vectors = [{n: e.get_parameter(n).detach() - p.detach() for n, p in base.named_parameters()} for e in experts]
    for ratio in (0.0, 0.5, 0.9, 1.0):
        for vector in vectors:
            for tensor in vector.values():
                theirs = reference._magnitude_prune(tensor, ratio)
                assert torch.equal(prune_magnitude(tensor, ratio, "reference"), theirs)
        theirs = reference.SparseWeightEnsemblingMoE(
            16, copy.deepcopy(base), copy.deepcopy(experts), init_lambda=0.3, batch_first=True, tv_prune_ratio=ratio
        )
        pruned = [{n: prune_magnitude(t, ratio, "reference") for n, t in vector.items()} for vector in vectors]
        ours = WeightEnsemblingFFN(base, pruned, Router(16, 3), sparse=True)
        _same_router(theirs.gate, ours.gate)
        torch.testing.assert_close(ours(states), theirs(states), atol=1e-5, rtol=0)


@pytest.mark.parametrize("routing", ["sample", "batch"])
def test_layers_with_a_shared_router_equal_fusion_bench(mlps, routing):
    """Two layers in a row: what they give, and the gradient of the router they share."""
    reference = pytest.importorskip("fusion_bench.models.sparse_we_moe", reason="fusion-bench is not installed")
    base, experts, states = mlps
    second = perturbed(base), [perturbed(base) for _ in range(3)]
    gate, router = reference.construct_weight_ensembling_gate(16, 3, 0.3, 2), Router(16, 3)
    _same_router(gate, router)
    theirs, ours = nn.Sequential(), nn.Sequential()
    for own_base, own_experts in ((base, experts), second):
        theirs.append(
            reference.SparseWeightEnsemblingMoE_ShardGate(
                16, copy.deepcopy(own_base), copy.deepcopy(own_experts), init_lambda=0.3, batch_first=True,
                batch_reduce=routing == "batch", tv_prune_ratio=0.9, sharedgate=gate,
            )
        )  # fmt: skip
        vectors = [
            {n: e.get_parameter(n).detach() - p.detach() for n, p in own_base.named_parameters()} for e in own_experts
        ]
        pruned = [{n: prune_magnitude(t, 0.9, "reference") for n, t in vector.items()} for vector in vectors]
        ours.append(WeightEnsemblingFFN(own_base, pruned, router, routing, sparse=True))
    made, wanted = ours(states), theirs(states)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)
    made.square().mean().backward()
    wanted.square().mean().backward()
    for a, b in zip(_in_their_order(router), gate.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def _in_their_order(router: Router) -> list[nn.Parameter]:
    """The parameters in fusion-bench's order, of layers."""
    names = {0: ["bias"], 1: ["weight", "bias"], 2: ["hidden_weight", "hidden_bias", "weight", "bias"]}[router.depth]
    assert sorted(names) == sorted(name for name, _ in router.named_parameters())
    return [router.get_parameter(name) for name in names]


def _same_router(theirs: nn.Module, ours: Router) -> None:
    """Give both the same random parameters; theirs are named otherwise."""
    with torch.no_grad():
        for parameter, own in zip(theirs.parameters(), _in_their_order(ours), strict=True):
            parameter.copy_(0.3 * torch.randn_like(parameter))
            own.copy_(parameter)


def test_projection_models_are_found_by_pattern():
    base = CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY))
    assert len(list(ensembles(upscale(base, [perturbed(base)])))) == 2
