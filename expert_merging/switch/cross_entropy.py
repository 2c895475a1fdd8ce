"""Cross-entropy of a model on a task's targets, given the targets before (teacher forcing)."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers.models.switch_transformers.modeling_switch_transformers import router_losses

from expert_merging.data.batches import Size
from expert_merging.data.features import collate
from expert_merging.run import sharding
from expert_merging.run.deviations import deviates

Batch = dict[str, torch.Tensor]


def token_loss(wrapped, model, batch: dict[str, torch.Tensor], step: Size, reading: str) -> torch.Tensor:
    """What `batch` adds to its task's loss in a step: a scalar; over the step's batches these add up.

    The loss of a step is the cross-entropy a target token plus the weighted router losses: the z-loss a token, the balance
    loss a sequence. So neither the cut of a step into batches nor the number of processes changes it. The router losses
    see real tokens only; with the deviation `padding` all positions, as in transformers.

    Args:
        wrapped: the model as the accelerator prepared it; `model` is the same without wrapping.
    """
    labels = batch["labels"]
    outputs = wrapped(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels), output_router_logits=True, use_cache=False,
    )  # fmt: skip
    cross_entropy = torch.nn.functional.cross_entropy(
        outputs.logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    loss = cross_entropy / step.target_tokens
    for router_outputs, mask, tokens in (
        (outputs.encoder_router_logits, batch["attention_mask"], step.input_tokens),
        (outputs.decoder_router_logits, labels != -100, step.target_tokens),
    ):
        of_rows = len(labels) / step.rows
        if not deviates(reading, "padding"):
            z_loss, balance_loss = router_losses(router_outputs, mask)
            of_tokens = mask.sum() / tokens
        else:  # every example is padded to the same length: its share of positions is its share of rows
            z_loss, balance_loss = router_losses(router_outputs)
            of_tokens = of_rows
        loss = loss + model.config.router_z_loss_coef * z_loss * of_tokens
        loss = loss + model.config.router_aux_loss_coef * balance_loss * of_rows
    return loss


def teacher_forced(
    dataset, tokenizer, constants: SimpleNamespace, part: slice = slice(None),
    together: Callable[[list[dict[str, Any]], int], Batch] = collate,
):  # fmt: skip
    """Batches (input_ids, attention_mask, labels) of similar length, every row once, in an order that is always the same.

    `part` takes some of the batches: of several processes each one's share. `together` makes a batch of examples.
    """
    columns = dataset.with_format("numpy", columns=["input_ids", "labels"])[:]
    lengths = [(len(ids), len(labels)) for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True)]
    rows = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    size = constants.eval_batch_size
    for chosen in [rows[start : start + size] for start in range(0, len(rows), size)][part]:
        batch = [{"input_ids": columns["input_ids"][row], "labels": columns["labels"][row]} for row in chosen]
        yield together(batch, tokenizer.pad_token_id)


def layer_states(model, batch: Batch) -> dict[str, tuple[Sequence[torch.Tensor], torch.Tensor]]:
    """{stack: (states after each block [batch, tokens, width], which of the tokens are real)}, the targets given."""
    outputs = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(batch["labels"]),
        output_hidden_states=True, output_router_logits=False, use_cache=False,
    )  # fmt: skip
    return {
        "encoder": (outputs.encoder_hidden_states[1:], batch["attention_mask"].bool()),
        "decoder": (outputs.decoder_hidden_states[1:], batch["labels"] != -100),
    }


def task_loss(model, dataset, tokenizer, constants: SimpleNamespace, accelerator) -> float:
    """Mean cross-entropy of `model` (unwrapped) in nats a target token, end token included; all processes take part.

    Neither jitter nor dropout, no router losses; expert usage is counted as in any forward pass.
    """

    def logits_of(batch: Batch) -> torch.Tensor:
        inputs = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        more = {"output_router_logits": False} if hasattr(model.config, "num_experts") else {}  # T5 has none
        encoder = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**encoder, decoder_input_ids=inputs, use_cache=False, **more).logits

    return mean_loss(model, logits_of, dataset, tokenizer, constants, accelerator)


def mean_loss(
    model, logits_of: Callable[[Batch], torch.Tensor], dataset, tokenizer, constants: SimpleNamespace, accelerator,
    together: Callable[[list[dict[str, Any]], int], Batch] = collate,
) -> float:  # fmt: skip
    """As `task_loss`, of a model whose logits for a batch's labels `logits_of` gives, [examples, tokens, vocabulary]."""
    first, processes = sharding.share(accelerator, model)
    total = torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    with sharding.evaluation(model):
        for batch in teacher_forced(dataset, tokenizer, constants, slice(first, None, processes), together):
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            losses = torch.nn.functional.cross_entropy(
                logits_of(batch).flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=-100, reduction="sum"
            )
            total += torch.tensor([losses.item(), (batch["labels"] != -100).sum().item()])
    model.train(was_training)
    total = accelerator.reduce(total.float().to(accelerator.device), "sum") if processes > 1 else total
    return round((total[0] / total[1]).item(), 6)
