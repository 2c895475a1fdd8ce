"""Heads and fine-tuned encoders: what neighbours/WEMoE_text.py merges.

A task's head is trained once, on the embeddings of the pre-trained encoder, and frozen: the encoder is then fine-tuned under
it, alone or with all tasks. So every model, the pre-trained one too, has the same head for a task, as CLIP's text tower gives
one to every vision tower, and a task whose model is not merged can be tested.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from expert_merging.core.bars import bar as progress_bar
from expert_merging.core.files import new_folder
from expert_merging.data.batches import epoch_examples, length_grouped
from expert_merging.data.docstring_reader import corpus_hash
from expert_merging.data.text_tasks import TextTask
from expert_merging.run import results
from expert_merging.training import checkpoints, loop
from expert_merging.wemoe import text_encoder
from expert_merging.wemoe.scoring import embed, evaluate

HEAD = (
    "head_c",
    "train_texts",
    "max_tokens",
)  # the constants that a head follows from, and those of a fine-tuned model
TRAINING = (*HEAD, "validation_texts", "finetune_epochs", "finetune_lr", "finetune_batch", "warmup", "precision")


def head_of(c: SimpleNamespace, seed: int, task: TextTask, tokenizer, device: torch.device) -> torch.Tensor:
    """The task's head [classes, D]: multinomial logistic regression without intercept on the unit embeddings of its training
    examples by the pre-trained encoder, C = head_c. Kept in a file, and read from there the next time."""
    from sklearn.linear_model import LogisticRegression

    rows = task.sample("train", c.train_texts, seed)
    path = seed_folder(c, seed) / "heads" / f"{task.name}.json"
    identity = results.identity(c, HEAD, seed=seed, task=task.name, data=corpus_hash(rows), encoder=c.encoder_sha256)
    if (kept := results.part(path, identity)) is not None:
        return torch.tensor(kept["head"])
    empty = text_encoder.task_of(task.name, rows, torch.zeros(0), tokenizer, c)
    encoder = text_encoder.TextEncoder(text_encoder.load(c.ENCODER)).eval().to(device)
    states = []
    with torch.no_grad():
        for start in progress_bar(
            range(0, len(rows), c.scoring_batch), f"seed {seed}, head of {task.name}", leave=False
        ):
            indices = list(range(start, min(start + c.scoring_batch, len(rows))))
            states.append(embed(encoder, empty.inputs(indices).to(device)).cpu())
    fitted = LogisticRegression(C=c.head_c, fit_intercept=False, max_iter=1000).fit(
        torch.cat(states).numpy(), empty.labels
    )
    found = fitted.coef_ if len(fitted.coef_) > 1 else np.concatenate([-fitted.coef_, fitted.coef_]) / 2
    rows_of_head = found.astype(
        np.float32
    ).tolist()  # as read from the file, in memory too: another order of bytes rounds anew
    results.save(path, identity, {"head": rows_of_head})
    return torch.tensor(rows_of_head)


def finetuned(
    c: SimpleNamespace, accelerator, seed: int, name: str, tasks: Sequence[TextTask], heads: Mapping[str, torch.Tensor],
    tokenizer,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Fine-tune the encoder on one task, or on several at once, under frozen heads, unless it has been done.

    A step is a batch of one task; of several tasks the batches come in random order. The epoch with the best mean accuracy on
    validation is kept.

    Returns:
        (the model's folder, {"validation": {task: accuracy of the epoch that was kept}, "history", "seconds"}).
    """
    folder = seed_folder(c, seed) / "models" / name
    train = {task.name: task.sample("train", c.train_texts, seed) for task in tasks}
    held = {task.name: task.sample("validation", c.validation_texts) for task in tasks}
    identity = results.identity(
        c, TRAINING, seed=seed, tasks=list(train), data=corpus_hash([train, held]), encoder=c.encoder_sha256
    )
    record = folder / "finetuning.json"
    work = folder.with_name(f"{name}.run")
    if not results.is_done(record, identity, work, claim=folder, elsewhere="WEMOE_TEXT_DIR"):
        _train(c, accelerator, seed, name, train, held, heads, tokenizer, folder, identity)
    return folder, results.load(record, "the same command again")


def _train(c, accelerator, seed, name, train, held, heads, tokenizer, folder: Path, identity: dict[str, Any]) -> None:
    from accelerate.utils import set_seed

    work, started = folder.with_name(f"{name}.run"), time.monotonic()
    checkpoints.claim(work, identity)
    set_seed(seed)
    model = text_encoder.load(c.ENCODER)
    device = accelerator.device
    fitted = {
        task: text_encoder.task_of(task, rows, heads[task], tokenizer, c).to(device) for task, rows in train.items()
    }
    tested = [text_encoder.task_of(task, rows, heads[task], tokenizer, c).to(device) for task, rows in held.items()]
    encoder = text_encoder.TextEncoder(model)
    places = list(fitted)

    def steps_of(epoch: int) -> list[list[tuple[str, np.ndarray]]]:
        passes = []
        for number, (task, own) in enumerate(fitted.items()):
            # Examples lie shortest first, so that their place tells of their length.
            chosen = epoch_examples(len(own.labels), len(own.labels), epoch, seed=seed * 100 + number)
            batches = length_grouped(chosen, np.arange(len(own.labels)), c.finetune_batch, seed=seed * 1000 + epoch)
            passes += [(task, batch) for batch in batches]
        order = np.random.default_rng([seed, epoch, len(places)]).permutation(len(passes))
        return [[passes[i]] for i in order]

    total = sum(-(-len(task.labels) // c.finetune_batch) for task in fitted.values()) * c.finetune_epochs

    def factor(epoch: int, step: int) -> float:
        """Linear warm-up, then linear to 0."""
        done = (epoch * total // c.finetune_epochs + step + 1) / (total + 1)
        return min(done / c.warmup if c.warmup else 1.0, (1 - done) / (1 - c.warmup))

    def loss_of(wrapped, one) -> tuple[torch.Tensor, int]:
        task, rows = fitted[one[0]], one[1].tolist()
        logits = embed(encoder, task.inputs(rows)) @ task.head.t()
        return F.cross_entropy(logits, torch.tensor([task.labels[i] for i in rows], device=device)), len(rows)

    def after_epoch(epoch: int) -> dict[str, Any]:
        encoder.eval()
        found = evaluate(encoder, tested, _Plain(c.scoring_batch), title=f"{name}: validating")
        scores = {task.name: found[task.name]["accuracy"] for task in tested}
        return {"selection": sum(scores.values()) / len(scores), "validation": scores}

    optimizer = torch.optim.AdamW(model.parameters(), lr=c.finetune_lr, weight_decay=0.01, fused=True)
    history = loop.train(
        accelerator, model, optimizer, num_epochs=c.finetune_epochs, steps_of=steps_of, loss_of=loss_of,
        after_epoch=after_epoch, folder=work, checkpoint_minutes=c.checkpoint_minutes, max_grad_norm=1.0, schedule=factor,
        label=f"seed {seed}, {name}:",
    )  # fmt: skip
    accelerator.free_memory()
    best = text_encoder.load(checkpoints.best_folder(work, history))
    with new_folder(folder) as temporary:
        best.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        kept = history[checkpoints.best_epoch(history)]["validation"]
        told = {"validation": kept, "history": history, "seconds": time.monotonic() - started}
        results.save(temporary / "finetuning.json", identity, told)
    checkpoints.release(work)
    print(f"seed {seed}, {name}: validation " + ", ".join(f"{task} {100 * value:.1f}" for task, value in kept.items()))


class _Plain:
    """Settings of a forward pass."""

    logit_scale, seed = 1.0, 0

    def __init__(self, eval_batch_size: int):
        self.eval_batch_size = eval_batch_size


def seed_folder(c: SimpleNamespace, seed: int) -> Path:
    return Path(c.WEMOE_TEXT_DIR) / f"seed{seed}"
