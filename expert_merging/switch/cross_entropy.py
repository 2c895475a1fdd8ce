"""Cross-entropy of a model on a task's targets, given the targets before (teacher forcing)."""

from types import SimpleNamespace

import torch

from expert_merging.data.features import collate
from expert_merging.run import sharding


def teacher_forced(dataset, tokenizer, constants: SimpleNamespace, part: slice = slice(None)):
    """Batches (input_ids, attention_mask, labels) of similar length, every row once, in an order that is always the same.

    `part` takes some of the batches: of several processes each one's share.
    """
    columns = dataset.with_format("numpy", columns=["input_ids", "labels"])[:]
    lengths = [(len(ids), len(labels)) for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True)]
    rows = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    size = constants.eval_batch_size
    for chosen in [rows[start : start + size] for start in range(0, len(rows), size)][part]:
        batch = [{"input_ids": columns["input_ids"][row], "labels": columns["labels"][row]} for row in chosen]
        yield collate(batch, tokenizer.pad_token_id)


def task_loss(model, dataset, tokenizer, constants: SimpleNamespace, accelerator) -> float:
    """Mean cross-entropy of `model` (unwrapped) in nats a target token, end token included; all processes take part.

    Neither jitter nor dropout, no router losses; expert usage is counted as in any forward pass.
    """
    first, processes = sharding.share(accelerator, model)
    total = torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    with sharding.evaluation(model):
        for batch in teacher_forced(dataset, tokenizer, constants, slice(first, None, processes)):
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            inputs = model.prepare_decoder_input_ids_from_labels(labels)
            more = {"output_router_logits": False} if hasattr(model.config, "num_experts") else {}  # T5 has none
            logits = model(**batch, decoder_input_ids=inputs, use_cache=False, **more).logits
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            total += torch.tensor([losses.item(), (labels != -100).sum().item()])
    model.train(was_training)
    total = accelerator.reduce(total.float().to(accelerator.device), "sum") if processes > 1 else total
    return round((total[0] / total[1]).item(), 6)
