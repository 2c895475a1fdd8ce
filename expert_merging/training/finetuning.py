"""Fine-tuning a mixture of experts on one task or on several at once, by the same code (paper, 4.1 and A.3).

An optimizer step takes `batch_size * gradient_accumulation_steps` examples of each task. Its loss is the mean over tasks
of the cross-entropy a target token, plus the router losses. Tasks larger than the smallest one rotate over the epochs.
After each epoch every validation example is decoded; the best epoch is kept, and tested at the end.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from expert_merging.core.errors import UserError
from expert_merging.data.batches import MicroBatches, Size, epoch_examples, length_grouped
from expert_merging.data.features import noted_sha256
from expert_merging.data.tasks import get_task
from expert_merging.run import results, sharding
from expert_merging.switch.models import save_model, save_state_dict
from expert_merging.training import checkpoints, families, loop
from expert_merging.training.evaluate import on_split
from expert_merging.training.histories import history_of
from expert_merging.training.overall import overall, selection_split, summary
from expert_merging.training.released_history import as_released


@dataclass(frozen=True)
class Pass:
    """The examples of one forward pass, all of one task."""

    task: str
    rows: np.ndarray  # which examples, over all processes
    step: Size  # of all the task's passes in the step


def finetune(
    c: SimpleNamespace, accelerator, model, tokenizer, data: dict[str, Any], *,
    name: str, save_as: str, work: Path, identity: dict[str, Any], goals: dict[str, dict[str, float]] | None = None,
    more: dict[str, Any] | None = None, models_folder: Path, histories_folder: Path, num_epochs: int | None = None,
) -> None:  # fmt: skip
    """Fine-tune `model` on the tasks of `data`, keep the best epoch, test it, and write weights and history.

    Args:
        data: task -> features (train, validation, test).
        name: of the history and of the Hugging Face folder; `save_as` (with {epoch}) names the .pt file.
        work: folder for checkpoints while it runs; removed at the end.
        identity: what the run depends on; it is refused to go on from another's checkpoints.
        goals: {"validation": {task: score of the single-task model}, "test": ...}, by which Overall is measured.
        more: further entries of the history.
        num_epochs: other than the constant of that name.

    Raises UserError where the tokenizer has tokens that the model has not, or is not for its family, and as `loop.train` does.
    """
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}: not of one kind"
        )
    family = families.family_of(model)
    family.check_tokenizer(tokenizer)
    model = sharding.place(accelerator, model)
    family.count_usage(model, c)
    if c.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sharded = sharding.is_sharded(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=c.lr, betas=c.adam_betas, eps=c.adam_eps, weight_decay=c.weight_decay, fused=not sharded
    )
    if not sharded:
        family.pass_over_idle(model, optimizer)
    checkpoints.claim(work, identity)  # by what can be begun: a claim refuses other constants from then on
    lengths = {task: _lengths(features["train"]) for task, features in data.items()}
    per_epoch = min(len(features["train"]) for features in data.values())

    def steps_of(epoch: int) -> list[list[Pass]]:
        step_rows = c.batch_size * c.gradient_accumulation_steps
        rows = []
        for number, task in enumerate(data):
            inputs, targets = lengths[task]
            chosen = epoch_examples(len(inputs), per_epoch, epoch, seed=c.seed * 1000 + number)
            groups = length_grouped(chosen, inputs, step_rows, seed=(c.seed * 1000 + number) * 1000 + epoch)
            rows.append([_passes(task, group, inputs, targets, c.batch_size) for group in groups])
        return [[one for passes in step for one in passes] for step in zip(*rows, strict=True)]

    def loss_of(wrapped, one: Pass) -> tuple[torch.Tensor, int]:
        # Of several processes each takes every n-th row; one that finds none repeats a row without weight.
        mine = one.rows[accelerator.process_index :: accelerator.num_processes]
        weight = accelerator.num_processes * (len(mine) > 0) / len(data)
        features = data[one.task]["train"].with_format("numpy", columns=["input_ids", "labels"])
        part = features[(mine if len(mine) else one.rows[:1]).tolist()]
        rows = [{"input_ids": i, "labels": t} for i, t in zip(part["input_ids"], part["labels"], strict=True)]
        batch = family.collate(rows, tokenizer.pad_token_id, c)
        batch = {key: value.to(accelerator.device) for key, value in batch.items()}
        return family.token_loss(wrapped, model, batch, one.step, c.reading) * weight, len(mine)

    def evaluate(split: str, label: str) -> dict[str, dict[str, Any]]:
        return on_split(c, accelerator, model, tokenizer, data, split, label)

    def after_epoch(epoch: int) -> dict[str, Any]:
        split = selection_split(c.reading)
        result = evaluate("validation", f"epoch {epoch + 1}: validating")
        scores = {task: one["scores"] for task, one in result.items()}
        tested = {}
        if c.test_each_epoch or split == "test":
            tested = evaluate("test", f"epoch {epoch + 1}: testing")
        chosen_by = {task: one["scores"] for task, one in (tested if split == "test" else result).items()}
        value = overall(chosen_by, goals[split] if goals else None)
        line = ", ".join(f"{task} {one[get_task(task).main_score]:.2f}" for task, one in scores.items())
        accelerator.print(f"{name} epoch {epoch + 1}: {line}" + (f", Overall {value:.4f}" if goals else ""))
        return {
            "selection": value, "scores": scores, "usage": {task: one["usage"] for task, one in result.items()},
            "test": {task: {key: one[key] for key in ("scores", "each", "examples")} for task, one in tested.items()},
        }  # fmt: skip

    started = time.strftime("%Y-%m-%d %H:%M")
    epochs = loop.train(
        accelerator, model, optimizer, num_epochs=num_epochs or c.num_epochs, steps_of=steps_of, loss_of=loss_of,
        after_epoch=after_epoch, folder=work, checkpoint_minutes=c.checkpoint_minutes, max_grad_norm=c.max_grad_norm,
        micro_batches=MicroBatches(), label=name,
    )  # fmt: skip
    del optimizer  # its states are twice the model, and the best epoch's weights come beside the last one's
    accelerator.free_memory()
    best = checkpoints.best_epoch(epochs)
    model = sharding.place(accelerator, family.load_model(checkpoints.best_folder(work, epochs), "best epoch"))
    result = epochs[best]["test"] or evaluate("test", "testing")

    history = history_of(accelerator, model, name, started, epochs, result, goals, more or {})
    model = sharding.whole(accelerator, model)
    if accelerator.is_main_process:
        save_state_dict(model, models_folder / save_as.format(epoch=best + 1))
        save_model(model, tokenizer, models_folder / name)
        released = as_released(history, [epoch["usage"] for epoch in epochs], goals)
        results.save(histories_folder / f"{name}.json", identity, history, released)
        checkpoints.release(work)
    accelerator.wait_for_everyone()
    accelerator.print(summary(history))


def epochs_worth(data: dict[str, Any], num_epochs: int) -> int:
    """How many joint epochs hold as many examples as `num_epochs` epochs of every task by itself, to the nearest."""
    sizes = [len(features["train"]) for features in data.values()]
    return round(num_epochs * sum(sizes) / (len(sizes) * min(sizes)))


def data_hashes(c: SimpleNamespace, tasks: list[str]) -> dict[str, str]:
    """SHA-256 of each task's features, as datasets_preprocessing.py noted it."""
    return {task: noted_sha256(task, c) for task in tasks}


def _lengths(features) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of every input and of every target."""
    columns = (features.with_format("arrow")[name] for name in ("input_ids", "labels"))
    inputs, targets = (np.array([len(ids) for ids in column.to_pylist()]) for column in columns)
    return inputs, targets


def _passes(task: str, group: np.ndarray, inputs: np.ndarray, targets: np.ndarray, batch_size: int) -> list[Pass]:
    step = Size(len(group), int(inputs[group].sum()), int(targets[group].sum()))
    return [Pass(task, group[i : i + batch_size], step) for i in range(0, len(group), batch_size)]
