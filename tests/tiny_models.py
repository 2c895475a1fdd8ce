"""Transformers models of a few thousand parameters, with random weights, for tests."""

import json

import numpy as np
import torch
from PIL import Image
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
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


def tiny_switch(seed: int, experts: int = 3) -> torch.nn.Module:
    """A Switch of two sparse layers a stack, in evaluation mode; its end token is 1."""
    torch.manual_seed(seed)
    config = SwitchTransformersConfig(
        vocab_size=40, d_model=8, d_kv=4, d_ff=12, num_heads=2, num_layers=4, num_decoder_layers=4, num_experts=experts,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        initializer_factor=3.0,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config).eval()


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


CLIP_TASKS = ("mnist", "eurosat", "dtd")


def write_clip(folder, tower_of=None):
    """A CLIP of 16-pixel images whose tokenizer knows single characters; or only a vision tower near `tower_of`'s."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast, CLIPVisionModel
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    if tower_of is not None:
        tower = CLIPVisionModel.from_pretrained(tower_of)
        for parameter in tower.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        tower.save_pretrained(folder)
        return
    characters = list(bytes_to_unicode().values())
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(words), "eos_token_id": len(words) - 1, "bos_token_id": len(words) - 2}
    config = CLIPConfig(
        text_config=text, vision_config={**size, "image_size": 16, "patch_size": 8}, projection_dim=8,
        logit_scale_init_value=2.0,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)


def write_images(folder, task: str, parquet: bool, splits=("test",), names: bool = True):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    from datasets import Image as Picture

    random = np.random.default_rng(len(task))
    label = ClassLabel(names=["one", "two_three", "four"]) if names else Value("int64")
    features = Features({"image": Picture(), "label": label})
    made = {}
    for split in splits:
        pictures = [Image.fromarray(random.integers(0, 256, (18, 24, 3), dtype=np.uint8)) for _ in range(14)]
        made[split] = Dataset.from_dict({"image": pictures, "label": [i % 3 for i in range(14)]}, features=features)
        if parquet:
            folder.mkdir(parents=True, exist_ok=True)
            made[split].to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    if not parquet:
        DatasetDict(made).save_to_disk(str(folder))


def write_clip_place(folder):
    """A CLIP, a vision tower fine-tuned on each of CLIP_TASKS, as it were, and their images, in `folder`; returns it."""
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    write_clip(folder / "base")
    for task in CLIP_TASKS:
        write_clip(folder / f"tower_{task}", tower_of=folder / "base")
        write_images(folder / "data" / task, task, parquet=task != "dtd", splits=("test", "contrast"))
    return folder


def moe_parameters(config) -> int:
    """How many parameters the dense model has in the FFNs that became mixtures, of an HEMoEConfig."""
    return len(config.moe_layers) * 3 * config.dense["hidden_size"] * config.dense["intermediate_size"]


def sparsity(share: float, moe_parameters: int, all_parameters: int) -> float:
    """HEMoE's authors record what is switched off for a token, of all parameters, as 1 - P_moe / P_all (1 - r): the
    activated part; embeddings count, routers do not. `share` is r, the activated share of the experts' neurons."""
    return 1 - moe_parameters / all_parameters * (1 - share)


TEXT_TASKS = ("who", "where", "pairs")


def write_text_place(folder):
    """A BERT with random weights and its tokenizer in `folder`/bert, three tasks of text in `folder`/tasks; returns it."""
    import random

    from raw_data import SUBJECTS, VERBS, sentences, tiny_tokenizer
    from transformers import BertModel

    from expert_merging.meo.bases import new_tokenizer

    torch.manual_seed(0)
    tokenizer = new_tokenizer(tiny_tokenizer())
    sizes = {"hidden_size": SIZE, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id, **sizes
    )
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    texts = random.Random(0).sample(sentences(120), 120)
    rows = {
        "who": [{"text": text, "label": [text.startswith(who) for who in SUBJECTS].index(True) % 3} for text in texts],
        "where": [{"text": text, "label": int(any(verb in text for verb in VERBS[:4]))} for text in texts],
        "pairs": [
            {"text": text, "text2": text[::-1] if i % 2 else text, "label": i % 2} for i, text in enumerate(texts)
        ],
    }  # fmt: skip
    for task, own in rows.items():
        (folder / "tasks" / task).mkdir(parents=True)
        for split, part in (("train", own[:60]), ("validation", own[60:80]), ("test", own[80:])):
            write_lines(folder / "tasks" / task / f"{split}.jsonl", part)
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
