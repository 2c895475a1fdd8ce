"""Linear CKA against its closed forms, and between two models."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from raw_data import sentences, tiny_tokenizer

from expert_merging.analysis.cka import LinearCKA, layerwise_cka


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cka(x, y, rows=None):
    """CKA with the rows coming `rows` at a time."""
    measure = LinearCKA()
    for a, b in zip(x.split(rows or len(x)), y.split(rows or len(y)), strict=True):
        measure.update(a, b)
    return measure.value()


def by_gram_matrices(x, y):
    """The same from n x n Gram matrices: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    centring = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    k, l = (centring @ (features @ features.T) @ centring for features in (x, y))
    return ((k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()).item()


@given(st.integers(2, 40), st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.integers(0, 999))
def test_equals_gram_matrices_however_batched(n, p, q, rows, seed):
    x, y = normal(n, p, seed=seed) + 3, normal(n, q, seed=seed + 1000) * 5
    assert cka(x, y, rows) == pytest.approx(by_gram_matrices(x, y), abs=1e-10)
    assert 0 <= cka(x, y, rows) <= 1 + 1e-12


@given(st.integers(0, 999), st.floats(1e-3, 1e3), st.floats(-1e5, 1e5))
def test_blind_to_rotation_scale_and_translation(seed, scale, shift):
    x, y = normal(30, 5, seed=seed), normal(30, 4, seed=seed + 1000)
    rotation = torch.linalg.qr(normal(5, 5, seed=seed + 2000)).Q
    moved = scale * x @ rotation + shift
    assert cka(x, moved) == pytest.approx(1, abs=1e-9)
    assert cka(moved, y) == pytest.approx(cka(x, y), abs=1e-9)
    assert cka(y, moved) == pytest.approx(cka(moved, y), abs=1e-12)


def test_not_blind_to_other_linear_maps():
    x = normal(50, 4)
    assert cka(x, x * torch.tensor([1.0, 10, 100, 1000])) < 0.9


def test_orthogonal_features_are_unlike():
    columns = torch.linalg.qr(torch.cat([torch.ones(20, 1, dtype=torch.float64), normal(20, 6)], 1)).Q[:, 1:]
    assert cka(columns[:, :3] + 7, columns[:, 3:] - 2) == pytest.approx(0, abs=1e-20)


def test_memory_does_not_grow_with_the_rows():
    measure, sizes = LinearCKA(), []
    for seed in range(3):
        measure.update(normal(50, 4, seed=seed).float(), normal(50, 3, seed=seed))
        held = [t for value in vars(measure).values() if isinstance(value, tuple) for t in value]
        assert all(t.dtype == torch.float64 and t.untyped_storage().nbytes() == 8 * t.numel() for t in held)
        sizes.append(sum(t.numel() for t in held))
    assert sizes == [2 * (4 + 3) + 16 + 9 + 12] * 3


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_constant_features(constant):
    x, same = normal(9, 3), torch.full((9, 2), constant)
    with pytest.raises(ValueError, match="second features are the same in all 9 rows"):
        cka(x, same, 2)
    with pytest.raises(ValueError, match="first features are the same"):
        cka(same, x, 2)


def test_features_that_are_refused():
    measure = LinearCKA()
    measure.update(torch.zeros(0, 3), torch.zeros(0, 2))
    with pytest.raises(ValueError, match="no rows"):
        measure.value()
    for x, y in ((normal(4, 3), normal(5, 3)), (normal(4), normal(4))):
        with pytest.raises(ValueError, match="must be"):
            measure.update(x, y)
    x = normal(4, 3)
    x[2, 1] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        cka(x, normal(4, 3))


# -- between models


def switch(seed, experts=4, width=16, layers=3):
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(seed)
    config = SwitchTransformersConfig(
        vocab_size=300, d_model=width, d_kv=8, d_ff=16, num_heads=2, num_layers=layers, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=experts, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, expert_capacity=4, dropout_rate=0.1, router_jitter_noise=0.1,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config).train()


class Table(torch.nn.Module):
    """Each token's states are looked up, and the padding's are large: nothing but the measure can depend on batches."""

    def __init__(self, seed):
        super().__init__()
        self.config = SimpleNamespace(model_type="switch_transformers")
        self.states = normal(2, 300, 5 + seed, seed=seed)
        self.states[:, 0] = 1e3

    def prepare_decoder_input_ids_from_labels(self, labels):
        return labels.clamp(min=0)

    def forward(self, input_ids, attention_mask, decoder_input_ids, **_):
        embedding = torch.full((*input_ids.shape, 3), torch.nan)
        return SimpleNamespace(
            encoder_hidden_states=(embedding, *self.states[:, input_ids]),
            decoder_hidden_states=(embedding, *self.states[:, decoder_input_ids]),
        )


@pytest.fixture(scope="module")
def text():
    from datasets import Dataset

    tokenizer = tiny_tokenizer()
    inputs = tokenizer(sentences(13))["input_ids"]
    labels = [ids[: 2 + 3 * i % 7] + [1] for i, ids in enumerate(inputs)]
    return Dataset.from_dict({"input_ids": inputs, "labels": labels}), tokenizer


def layers_of(first, second, text, size=4):
    dataset, tokenizer = text
    return layerwise_cka(first, second, dataset, tokenizer, SimpleNamespace(eval_batch_size=size), "cpu")


def test_equal_models_are_alike(text):
    values = layers_of(switch(0), switch(0), text)
    assert [len(values[stack]) for stack in ("encoder", "decoder")] == [3, 2]
    assert values["encoder"] + values["decoder"] == pytest.approx([1] * 5, abs=1e-12)


def test_models_of_other_experts_and_width(text):
    model, other = switch(0), switch(1, experts=7, width=24)
    values = layers_of(model, other, text)
    assert all(0 < value < 1 for value in values["encoder"] + values["decoder"])
    assert model.training and other.training
    assert values == layers_of(model, other, text)


@pytest.mark.parametrize(("model", "tolerance"), [(Table, 1e-10), (switch, 1e-5)])  # Switch computes in float32
def test_batches_and_padding_change_nothing(text, model, tolerance):
    """One example at a time there is no padding; in batches there is."""
    dataset, _ = text
    assert len({len(ids) for ids in dataset["input_ids"]}) > 3 and len({len(ids) for ids in dataset["labels"]}) > 3
    values = [layers_of(model(0), model(1), text, size) for size in (1, 3, 13)]
    for one in values[1:]:
        for stack in ("encoder", "decoder"):
            assert one[stack] == pytest.approx(values[0][stack], abs=tolerance)


def test_equals_gram_matrices_of_hidden_states(text):
    """Example by example, from the models' own outputs."""
    dataset, _ = text
    model, other = switch(0).eval(), switch(1).eval()
    kept = {}
    for row in dataset:
        for which in (model, other):
            with torch.no_grad():
                outputs = which(
                    input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]),
                    output_hidden_states=True,
                )  # fmt: skip
            for stack in ("encoder", "decoder"):
                states = [state[0] for state in outputs[f"{stack}_hidden_states"][1:]]
                kept.setdefault((stack, which is model), []).append(states)
    values = layers_of(model, other, text)
    for stack in ("encoder", "decoder"):
        for layer, value in enumerate(values[stack]):
            x, y = (torch.cat([states[layer] for states in kept[stack, side]]).double() for side in (True, False))
            assert value == pytest.approx(by_gram_matrices(x, y), abs=1e-5)


def test_models_that_cannot_be_compared(text):
    with pytest.raises(ValueError, match="the encoders have 3 and 2 layers"):
        layers_of(switch(0), switch(1, layers=2), text)
    constant = switch(1)
    torch.nn.init.zeros_(constant.decoder.final_layer_norm.weight)
    with pytest.raises(ValueError, match="decoder, layer 2: .* second features are the same"):
        layers_of(switch(0), constant, text)
