"""Small BERT, GPT-2, T5 and BART, pre-trained on docstrings by their own objectives: what the embedded tasks start from.

The tokenizer is that of the small Switch (BASE_MODEL_PATH), with a token to begin and one to mask with.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from expert_merging.core.files import new_folder, read_json
from expert_merging.run import results
from expert_merging.switch.span_corruption import corrupt_spans


def new_tokenizer(switch_tokenizer):
    """The same vocabulary, each text between <extra_id_99> (begin) and </s>; <extra_id_98> masks."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer.from_str(switch_tokenizer.backend_tokenizer.to_str())
    raw.no_padding()
    raw.no_truncation()
    ends = [(token, raw.token_to_id(token)) for token in ("<extra_id_99>", "</s>")]
    raw.post_processor = processors.TemplateProcessing(
        single="<extra_id_99> $A </s>", pair="<extra_id_99> $A </s> $B </s>", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<extra_id_99>", cls_token="<extra_id_99>", eos_token="</s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<extra_id_98>", clean_up_tokenization_spaces=False,
        additional_special_tokens=[f"<extra_id_{i}>" for i in range(98)],
    )  # fmt: skip


def new_model(family: str, tokenizer, c: SimpleNamespace):
    """A model for pre-training with random weights: d_model, d_ff, num_layers, num_heads are those of `c`."""
    import transformers as tf

    ids = {
        "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }  # fmt: skip
    if family == "bert":
        return tf.BertForMaskedLM(tf.BertConfig(
            hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads, **ids,
        ))  # fmt: skip
    if family == "gpt2":
        return tf.GPT2LMHeadModel(tf.GPT2Config(
            n_embd=c.d_model, n_inner=c.d_ff, n_layer=c.num_layers, n_head=c.num_heads, **ids
        ))  # fmt: skip
    start = {"decoder_start_token_id": tokenizer.pad_token_id}
    if family == "t5":
        return tf.T5ForConditionalGeneration(tf.T5Config(
            d_model=c.d_model, d_ff=c.d_ff, d_kv=c.d_model // c.num_heads, num_layers=c.num_layers,
            num_heads=c.num_heads, **ids, **start,
        ))  # fmt: skip
    return tf.BartForConditionalGeneration(tf.BartConfig(
        d_model=c.d_model, encoder_layers=c.num_layers, decoder_layers=c.num_layers, encoder_ffn_dim=c.d_ff,
        decoder_ffn_dim=c.d_ff, encoder_attention_heads=c.num_heads, decoder_attention_heads=c.num_heads, **ids, **start,
        forced_eos_token_id=None,
    ))  # fmt: skip


def mask_tokens(
    ids: np.ndarray, tokenizer, rng: np.random.Generator, share: float = 0.15
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masking (Devlin et al., 2019, 3.1): of `share` of the tokens 80% become the mask, 10% a random token.

    Returns (input, labels), both of the shape of `ids`; labels are -100 where nothing is asked. Special tokens stay.
    """
    asked = (rng.random(ids.shape) < share) & ~np.isin(ids, tokenizer.all_special_ids)
    how = rng.random(ids.shape)
    masked = np.where(asked & (how < 0.8), tokenizer.mask_token_id, ids)
    masked = np.where(asked & (how >= 0.9), rng.integers(0, len(tokenizer), ids.shape), masked)
    return masked, np.where(asked, ids, -100)


def corrupted(family: str, blocks: np.ndarray, tokenizer, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """A batch for pre-training from blocks of token ids [batch, tokens]: T5 learns what spans were cut out, BART the whole
    text from one with spans masked, GPT-2 the next token, BERT the masked ones."""
    if family == "bert":
        inputs, labels = mask_tokens(blocks, tokenizer, rng)
    elif family == "gpt2":
        inputs = labels = blocks
    else:
        sentinels = np.array(tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(98)]))
        pairs = [corrupt_spans(block, sentinels, tokenizer.eos_token_id, rng) for block in blocks]
        inputs, labels = np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])
        if family == "bart":
            inputs = np.where(np.isin(inputs, sentinels), tokenizer.mask_token_id, inputs)
            labels = np.concatenate([blocks, np.full((len(blocks), 1), tokenizer.eos_token_id)], axis=1)
    return {"input_ids": torch.tensor(inputs), "labels": torch.tensor(labels)}


def pretrain_once(c: SimpleNamespace, accelerator, folder: Path) -> str:
    """`pretrain` on docstrings, unless it has been done; returns the path of `folder`.

    Raises UserError where a model with other constants lies there.
    """
    from expert_merging.data import docstring_reader, docstring_splits
    from expert_merging.meo import recipes
    from expert_merging.switch import models

    record = folder / "pretraining.json"
    if record.exists():
        noted = results.made_with(read_json(record))  # says of the text what only reading it tells
        remedy = "restore them, remove the folder, or choose another MEO_DIR"
        results.refuse(folder, *results.shared(noted, _identity(c, c.family)), remedy)
    elif not folder.is_dir():
        tokenizer = new_tokenizer(models.base_tokenizer(c, 8))
        texts = docstring_splits.pretraining_texts(docstring_reader.read_docstrings())
        blocks = recipes.blocks_of(texts, tokenizer, c.pretraining_length)
        pretrain(c, accelerator, c.family, tokenizer, list(blocks), folder)
    return str(folder)


def _identity(c: SimpleNamespace, family: str) -> dict[str, Any]:
    """The constants that a pre-trained model follows from."""
    constants = results.identity(c, ("seed", "d_model", "d_ff", "num_layers", "num_heads", "precision"))
    return constants | {
        "steps": c.pretraining_steps, "batch": c.pretraining_batch, "lr": c.pretraining_lr,
        "length": c.pretraining_length, "family": family,
    }  # fmt: skip


def pretrain(c: SimpleNamespace, accelerator, family: str, tokenizer, blocks: list[np.ndarray], folder: Path) -> None:
    """Pre-train a new model for `pretraining_steps` steps and write it with its tokenizer and record into `folder`."""
    from expert_merging.training import checkpoints, loop

    stack = np.stack(blocks)
    order = np.random.default_rng(0).permutation(len(stack))
    heldout, kept = stack[order[:128]], stack[order[128:]]
    identity = _identity(c, family) | {"blocks": len(kept), "tokens": int(kept.size)}
    work = Path(f"{folder}.run")
    checkpoints.claim(work, identity)
    model = new_model(family, tokenizer, c)

    def steps_of(_):
        rng = np.random.default_rng([c.seed, 1])
        return [[(rng.integers(0, len(kept), c.pretraining_batch), step)] for step in range(c.pretraining_steps)]

    def loss_of(wrapped, one):
        rows, step = one
        batch = corrupted(family, kept[rows], tokenizer, np.random.default_rng([c.seed, 2, step]))
        return _loss(wrapped, {name: ids.to(accelerator.device) for name, ids in batch.items()}), len(rows)

    def after(_):
        model.eval()
        rng, losses = np.random.default_rng(3), []
        with torch.no_grad():
            for start in range(0, len(heldout), 32):
                batch = corrupted(family, heldout[start : start + 32], tokenizer, rng)
                losses.append(_loss(model, {name: ids.to(accelerator.device) for name, ids in batch.items()}).item())
        loss = sum(losses) / len(losses)
        accelerator.print(f"{family}: held-out cross-entropy {loss:.4f} nats a target token")
        return {"selection": -loss, "heldout_loss": loss}

    def schedule(_, step):
        done = (step + 1) / c.pretraining_steps
        return min(1.0, done / 0.06) * 0.5 * (1 + math.cos(math.pi * done))

    optimizer = torch.optim.AdamW(model.parameters(), lr=c.pretraining_lr, betas=(0.9, 0.98), weight_decay=0.01)
    history = loop.train(
        accelerator, model, optimizer, num_epochs=1, steps_of=steps_of, loss_of=loss_of, after_epoch=after, folder=work,
        checkpoint_minutes=c.checkpoint_minutes, max_grad_norm=1.0, schedule=schedule, label=f"pre-training {family}",
    )  # fmt: skip
    if accelerator.is_main_process:
        with new_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            record = {"history": history, "parameters": model.num_parameters()}
            results.save(temporary / "pretraining.json", identity, record)
        checkpoints.release(work)
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def _loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy a target token. BERT's output layer sees the masked positions only: the vocabulary is most of the cost."""
    if not hasattr(model, "bert"):  # another family, or wrapped for several processes
        return model(**batch).loss
    asked = batch["labels"] != -100
    states = model.bert(batch["input_ids"]).last_hidden_state[asked]
    return torch.nn.functional.cross_entropy(model.cls(states), batch["labels"][asked])
