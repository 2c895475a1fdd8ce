"""The patched Switch Transformers, and the stock one from the originals that caem_files/install.py keeps."""

import importlib

import pytest
import torch
from hypothesis import strategies as st
from transformers.models.switch_transformers import caem, cpu_kernels  # noqa: F401
from transformers.models.switch_transformers import modeling_switch_transformers as ours

if not hasattr(ours, "CAEM_PATCH"):
    pytest.skip("transformers is not patched: python caem_files/install.py", allow_module_level=True)

try:
    stock = importlib.import_module("transformers.models.switch_transformers_stock.modeling_switch_transformers")
except ImportError:
    stock = None

needs_stock = pytest.mark.skipif(stock is None, reason="the stock files were not kept; patch with install.py, not cp")


@st.composite
def switch_settings(draw, max_layers=4):
    """Keyword arguments of a small SwitchTransformersConfig with sparse layers in both stacks, few of capacity."""
    layers, decoder_layers = draw(st.integers(2, max_layers)), draw(st.integers(2, max_layers))
    heads = draw(st.integers(1, 3))
    return {
        "vocab_size": 40,
        "d_model": draw(st.sampled_from([8, 12])),
        "d_kv": draw(st.sampled_from([4, 6])),
        "d_ff": 16,
        "num_heads": heads,
        "num_layers": layers,
        "num_decoder_layers": decoder_layers,
        "num_sparse_encoder_layers": draw(st.integers(1, layers // 2)),
        "num_sparse_decoder_layers": draw(st.integers(1, decoder_layers // 2)),
        "num_experts": draw(st.integers(1, 5)),
        "expert_capacity": draw(st.sampled_from([1, 2, 3, 64])),
        "router_bias": draw(st.booleans()),
        "router_jitter_noise": draw(st.sampled_from([0.0, 0.01, 0.3])),
        "dropout_rate": draw(st.sampled_from([0.0, 0.1])),
        "dense_act_fn": draw(st.sampled_from(["relu", "gelu_new"])),
        "tie_word_embeddings": draw(st.booleans()),
        "decoder_start_token_id": 0,
    }


PLAIN = {
    "vocab_size": 40, "d_model": 12, "d_kv": 4, "d_ff": 16, "num_heads": 3, "num_layers": 4, "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_experts": 4, "expert_capacity": 3,
    "decoder_start_token_id": 0,
}  # fmt: skip


def build(module, settings, seed=0, kind="ForConditionalGeneration"):
    """A model of `module` (ours or stock) with the weights that `seed` gives, in eval mode."""
    torch.manual_seed(seed)
    config = module.SwitchTransformersConfig(**settings)
    return getattr(module, f"SwitchTransformers{kind}")(config).eval()


def batch(seed, rows=3, inputs=9, targets=7, vocab=40):
    """Ids, mask and labels of random lengths, padded on the right."""
    rng = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, vocab, (rows, inputs), generator=rng)
    labels = torch.randint(2, vocab, (rows, targets), generator=rng)
    lengths = torch.randint(1, inputs + 1, (rows, 1), generator=rng)
    target_lengths = torch.randint(1, targets + 1, (rows, 1), generator=rng)
    mask = (torch.arange(inputs) < lengths).long()
    labels = labels.masked_fill(torch.arange(targets) >= target_lengths, -100)
    return {"input_ids": input_ids * mask, "attention_mask": mask, "labels": labels}


def same(ours_output, stock_output, tolerance=1e-5):
    """Assert that two outputs (tensors, tuples, dicts of them, None) agree in structure and numbers."""
    if torch.is_tensor(stock_output):
        torch.testing.assert_close(ours_output, stock_output, atol=tolerance, rtol=tolerance)
    elif isinstance(stock_output, (tuple, list)):
        assert len(ours_output) == len(stock_output)
        for a, b in zip(ours_output, stock_output, strict=True):
            same(a, b, tolerance)
    elif hasattr(stock_output, "keys"):
        assert list(ours_output.keys()) == list(stock_output.keys())
        for key in stock_output.keys():
            same(ours_output[key], stock_output[key], tolerance)
    elif hasattr(stock_output, "to_legacy_cache"):
        assert type(ours_output) is type(stock_output)
        same(ours_output.to_legacy_cache(), stock_output.to_legacy_cache(), tolerance)
    else:
        assert ours_output == stock_output
