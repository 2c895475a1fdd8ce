"""Causal mixtures of experts with random weights, a few thousand parameters, and tokenizers as such models have."""

from pathlib import Path

import torch
from raw_data import sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
)

FAMILIES = ("mixtral", "olmoe", "qwen2_moe")


def byte_tokenizer(begins: bool = False, pads: bool = True, ends: bool = False):
    """Of bytes and some pairs of them, as GPT-2's; `begins`: with a token before each text, as Mixtral's; `ends`: one after."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|begin|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(sentences(100), trainer)
    if begins or ends:
        single = " ".join(["<|begin|>"] * begins + ["$A"] + ["<|end|>"] * ends)
        special_tokens = [("<|begin|>", 1)] * begins + [("<|end|>", 0)] * ends
        raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=special_tokens)
    more = {"pad_token": "<|pad|>"} if pads else {}
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", bos_token="<|begin|>", **more)


def config_of(family: str, vocabulary: int, experts: int = 4, k: int = 2, **more):
    sizes = {
        "vocab_size": vocabulary, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "intermediate_size": 24, "num_experts_per_tok": k, "max_position_embeddings": 128,
        "initializer_range": 0.2, "eos_token_id": 0, "bos_token_id": 1, "pad_token_id": None, **more,
    }  # fmt: skip
    if family == "mixtral":
        return MixtralConfig(**sizes, num_local_experts=experts)
    if family == "olmoe":
        return OlmoeConfig(**sizes, num_experts=experts)
    sizes |= {"num_hidden_layers": 3, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20}
    return Qwen2MoeConfig(**sizes, num_experts=experts, mlp_only_layers=[0], tie_word_embeddings=True)


def write_model(
    folder: Path, family: str, seed: int = 0, experts: int = 4, k: int = 2, vocabulary: int = 0, **more
) -> Path:
    """A folder as `from_pretrained` loads it. Mixtral's tokenizer begins texts with a token and has none for padding."""
    tokenizer = byte_tokenizer(begins=family == "mixtral", pads=family != "mixtral")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, vocabulary or len(tokenizer), experts, k, **more))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_dense(folder: Path) -> Path:
    """A Llama with a tokenizer, to be upcycled."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
    config = LlamaConfig(
        vocab_size=len(tokenizer), **sizes, max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=True
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
