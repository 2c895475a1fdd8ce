"""Dense transformers models of a few thousand parameters, with random weights, for the tests of MEO."""

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

FAMILIES = ("bert", "gpt2", "t5", "t5-gated", "bart")
VOCABULARY, SIZE, WIDTH, LAYERS = 50, 16, 32, 2


def tiny_model(family: str, seed: int = 0) -> torch.nn.Module:
    """In evaluation mode; biases are not zero."""
    torch.manual_seed(seed)
    one = {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    if family == "bert":
        config = BertConfig(**one, hidden_size=SIZE, intermediate_size=WIDTH, max_position_embeddings=32)
        model = BertForMaskedLM(config)
    elif family == "gpt2":
        shape = {"n_embd": SIZE, "n_layer": LAYERS, "n_head": 2, "n_positions": 32}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **shape))
    elif family.startswith("t5"):
        shape = {"d_model": SIZE, "d_kv": 8, "d_ff": WIDTH, "num_layers": LAYERS, "num_heads": 2}
        kind = {"feed_forward_proj": "gated-gelu" if family == "t5-gated" else "relu", "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **shape, **kind))
    else:
        shape = {"d_model": SIZE, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "max_position_embeddings": 64}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        widths = {"encoder_ffn_dim": WIDTH, "decoder_ffn_dim": WIDTH}
        config = BartConfig(vocab_size=VOCABULARY, **shape, **heads, **widths, forced_eos_token_id=None)
        model = BartForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def tiny_batch(size: int = 3, length: int = 7, prompt: int = 3) -> dict[str, torch.Tensor]:
    """Inputs, padded at the right, and labels: -100 on the prompt and on padding."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def perturb(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Make experts, gates and token blocks of a converted model differ from their start, in place."""
    from expert_merging import meo

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in meo.linears(model).values():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (0.5 * parameter.std(correction=0).clamp(min=0.2) * noise).to(parameter.dtype)
    return model
