"""Small Hugging Face folders to merge: a Llama, others fine-tuned from it as it were, and an adapter."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

TOKENS = 40


def llama(seed: int = 0, vocabulary: int = TOKENS, **shape):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | shape
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=vocabulary, **sizes))


def write_tokens(folder: Path, tokens: list[str]) -> None:
    model = {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": tokens[0]}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))


def words(number: int = TOKENS) -> list[str]:
    return [f"w{i}" for i in range(number)]


def tune(model, seed: int, by: float = 0.05):
    """Every parameter moved a little, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def write_world(place: Path, dtype=torch.float32) -> tuple[Path, list[Path]]:
    """The base, in shards, and two models of it, with tokenizers and cards."""
    place.mkdir(parents=True, exist_ok=True)
    for name, seed, licence in (("base", None, "apache-2.0"), ("one", 1, "apache-2.0"), ("two", 2, "mit")):
        model = llama() if seed is None else tune(llama(), seed)
        model.to(dtype).save_pretrained(place / name, max_shard_size="10KB" if name == "base" else "5GB")
        write_tokens(place / name, words())
        (place / name / "README.md").write_text(f"---\nlicense: {licence}\n---\nA model.\n")
    return place / "base", [place / "one", place / "two"]


def write_adapter(base: Path, folder: Path, seed: int = 0, **settings):
    """A LoRA adapter of the model in `base`, both of its factors away from zero; returns what peft makes of the two."""
    import torch.distributed.tensor  # noqa: F401  (peft takes for granted that somebody has)
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]} | settings
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return model.merge_and_unload().state_dict()
