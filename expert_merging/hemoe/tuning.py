"""Training on instruction data with transformers' `Trainer`: LoRA on attention, the routers in full, experts frozen."""

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.utils import logging

from expert_merging.core import interrupts
from expert_merging.core.errors import UserError
from expert_merging.core.hub import first_line
from expert_merging.hemoe.modeling import HEMoEForCausalLM
from expert_merging.hemoe.output_matrix import before_targets, logits_at

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def encode(tokenizer, example: dict, max_tokens: int, prompts: str = "plain") -> dict[str, list[int]]:
    """{"input_ids", "labels"} of an instruction, a space and its output, then </s>; no loss on the instruction.

    With `prompts` "chat" they are two turns in the tokenizer's chat template, and the loss is on the answer and the token
    that ends it. An example longer than `max_tokens` loses the start of its instruction, and the end of an output that
    takes more than half the room. Raises UserError where the template leaves no room.
    """
    if prompts == "chat":
        return _encode_chat(tokenizer, example["instruction"], example["output"], max_tokens)
    prompt = tokenizer(example["instruction"])["input_ids"]
    # The output is cut out of the whole, as lm_eval does: alone it might be tokenized otherwise.
    target = tokenizer(f"{example['instruction']} {example['output']}")["input_ids"][len(prompt) :]
    target = [*target, tokenizer.eos_token_id]
    target = target[: max(max_tokens - len(prompt), max_tokens // 2)]
    room = max_tokens - len(target)
    if len(prompt) > room:
        prompt = [prompt[0], *prompt[len(prompt) - room + 1 :]]  # <s> stays
    return {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}


def _encode_chat(tokenizer, instruction: str, output: str, max_tokens: int) -> dict[str, list[int]]:
    def ids(*contents: str) -> list[int]:
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=False)]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=len(turns) == 1)

    prompt = ids(instruction)
    target = ids(instruction, output)[len(prompt) :]
    ends = [at for at, token in enumerate(target) if token == tokenizer.eos_token_id]
    target = target[: ends[-1] + 1] if ends else [*target, tokenizer.eos_token_id]  # without the line break after it
    target = target[: max(max_tokens - len(prompt), max_tokens // 2)]
    room, words = max_tokens - len(target), tokenizer(instruction, add_special_tokens=False)["input_ids"]
    while len(prompt) > room:
        if not words:
            raise UserError(f"max_tokens is {max_tokens}; the chat template alone takes {len(prompt)}: raise it")
        words = words[len(prompt) - room :]  # the template stays whole
        prompt = ids(tokenizer.decode(words))
    return {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded {"input_ids", "attention_mask", "labels"} [batch, tokens]."""

    def padded(lists: list[list[int]], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in lists], batch_first=True, padding_value=value)

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, pad), "attention_mask": padded([[1] * len(x) for x in ids], 0),
        "labels": padded([row["labels"] for row in rows], -100),
    }  # fmt: skip


def batches(rows: list[dict[str, list[int]]], size: int, pad: int) -> list[dict[str, torch.Tensor]]:
    """All rows in batches of similar length, the longest first."""
    order = sorted(rows, key=lambda row: -len(row["input_ids"]))
    return [collate(order[start : start + size], pad) for start in range(0, len(order), size)]


def add_lora(model, rank: int, alpha: int, dropout: float):
    """`model` with LoRA on q, k, v and o of every layer; of the rest only learned routers are trained, in full."""
    import torch.distributed.tensor  # noqa: F401  (peft takes for granted that somebody has)
    from peft import LoraConfig, get_peft_model

    routers = isinstance(model, HEMoEForCausalLM) and model.config.router == "learned"
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=_ATTENTION,
        modules_to_save=["router"] if routers else None,
    )  # fmt: skip
    return get_peft_model(model, config)


class _Trainer(Trainer):
    """Draws k anew before each step where `any_k` is set, computes logits where there is a target, and resumes under PyTorch
    2.6 and later."""

    moe: HEMoEForCausalLM | None = None  # the mixture inside a peft model
    any_k = False

    def training_step(self, *arguments, **more):
        if self.moe is not None and self.any_k:
            # From the number of the step alone, so that a resumed run draws the same.
            generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
            self.moe.config.k = int(torch.randint(1, self.moe.config.num_experts + 1, (1,), generator=generator))
        return super().training_step(*arguments, **more)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rows, columns, targets = before_targets(inputs["labels"])
        # The model's loss sets the logits of a token against the label after it: the last logits are nobody's.
        rows, columns = (torch.nn.functional.pad(places, (0, 1)) for places in (rows, columns))
        inputs["labels"] = torch.nn.functional.pad(targets, (1, 0), value=-100)[None]
        with logits_at(model, rows, columns):
            return super().compute_loss(model, inputs, return_outputs=return_outputs)

    def _load_rng_state(self, checkpoint):
        import numpy as np
        from numpy._core.multiarray import _reconstruct

        # transformers 4.46 reads its own file of random states in the way that PyTorch 2.6 began to refuse.
        allowed = [_reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
        with torch.serialization.safe_globals(allowed):
            super()._load_rng_state(checkpoint)


def fit(
    model, rows: list[dict[str, list[int]]], pad: int, folder: Path, *, steps: int, batch_size: int, lr: float,
    accumulation: int = 1, warmup: float = 0.05, last_lr: float = 0.1, save_steps: int = 0, seed: int = 0,
    on_cpu: bool = True, bf16: bool = False, any_k: bool = False, label: str = "training",
) -> dict[str, Any]:  # fmt: skip
    """Train `model` in place on `rows` with AdamW, a cosine from `lr` to `last_lr` of it, gradients clipped at 1.

    `folder` holds checkpoints meanwhile: killed and called again, it goes on from the last one. `steps` are optimizer
    steps of batch_size * accumulation rows each.

    Args:
        save_steps: between checkpoints; 0 for every fifth of a training, 50 at most.
        any_k: draw the number of experts that fire from 1..n for every step (a mixture only).

    Returns:
        {"steps", "loss" (of the last tenth of the steps), "seconds" (of this call), "log"}.

    Raises:
        UserError: the loss is no longer a number, or a checkpoint cannot be read.
    """
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation, learning_rate=lr, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": last_lr}, warmup_ratio=warmup, weight_decay=0.0, max_grad_norm=1.0,
        save_steps=save_steps or min(50, max(1, steps // 5)), save_total_limit=1, logging_steps=max(1, steps // 20),
        report_to=[], seed=seed,
        use_cpu=on_cpu, bf16=bf16, remove_unused_columns=False, logging_nan_inf_filter=False,
        disable_tqdm=False,
    )  # fmt: skip
    arguments._n_gpu = min(1, arguments.n_gpu)  # of several GPUs one, since `compute_loss` takes a batch as a whole
    logging.get_logger("transformers.trainer").setLevel(logging.ERROR)  # it would say that max_steps is given
    trainer = _Trainer(model=model, args=arguments, train_dataset=rows, data_collator=lambda part: collate(part, pad))
    trainer.any_k = any_k
    # transformers 4.46 leaves it to the model to divide by what all passes of a step hold, which Llama does and a mixture
    # does not: its passes would be summed. Here the mean of the passes' losses counts, for every model.
    trainer.model_accepts_loss_kwargs = False
    trainer.accelerator.gradient_accumulation_steps = accumulation
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    trainer.moe = inner if isinstance(inner, HEMoEForCausalLM) else None
    bar = _one_bar(trainer, label)
    last = _last_whole(folder)
    seconds = 0.0
    try:
        if last and int(last.rpartition("-")[2]) >= steps:  # killed after its last step; `train` would add another
            trainer._load_from_checkpoint(last)
            trainer.state = TrainerState.load_from_json(f"{last}/trainer_state.json")
        else:
            seconds = trainer.train(resume_from_checkpoint=last).metrics["train_runtime"]
    except Exception as error:  # a file cut short surfaces as whatever its reader raises
        if last is None or bar.begun:
            raise
        raise UserError(
            f"{last} is damaged ({first_line(error)}); remove {folder} to begin this training again"
        ) from error
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not all(map(math.isfinite, losses)):
        raise UserError(f"{label}: the loss became {losses[-1]}; lower the learning rate and remove {folder}")
    return {
        "steps": steps, "loss": sum(losses[-2:]) / len(losses[-2:]), "log": losses,
        "seconds": seconds,
    }  # fmt: skip


def _last_whole(folder: Path) -> str | None:
    """The Trainer's newest checkpoint, if any; those that a kill left half-written are removed. Their state comes last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        interrupts.check()  # then it may well be whole
        shutil.rmtree(path)
    return None


def _one_bar(trainer: Trainer, label: str):
    """A bar with a name and the loss takes the place of the Trainer's printing; it says whether training has `begun`."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    from expert_merging.core.bars import bar as progress_bar

    class Bar(TrainerCallback):
        begun = False

        def on_train_begin(self, args, state, control, **more):
            self.begun = True
            self.bar = progress_bar(
                total=state.max_steps, initial=state.global_step, desc=label, unit="step",
                disable=not state.is_world_process_zero,
            )  # fmt: skip

        def on_step_end(self, args, state, control, **more):
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args, state, control, logs=None, **more):
            if logs and "loss" in logs:
                self.bar.set_postfix({"loss": f"{logs['loss']:.3f}"}, refresh=False)

        def on_train_end(self, args, state, control, **more):
            self.bar.close()

    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    bar = Bar()
    trainer.add_callback(bar)
    return bar
