"""Losses of a causal mixture: on the tokens of the target only, the input before them given."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from expert_merging.causal.routers import balance_loss
from expert_merging.causal.sequences import join, positions
from expert_merging.data.batches import Size
from expert_merging.switch import cross_entropy


def token_loss(wrapped, model, batch: dict[str, torch.Tensor], step: Size, reading: str) -> torch.Tensor:
    """What `batch` (`join`) adds to its task's loss in a step: a scalar; over the step's batches these add up.

    The loss of a step is the cross-entropy a target token plus the weighted balance loss, mean over sequences, so that neither
    the cut of a step into batches nor the number of processes changes it.

    Args:
        wrapped: the model as the accelerator prepared it; `model` is the same without wrapping.
    """
    routers = model.routers
    routers.logits.clear()
    loss = torch.nn.functional.cross_entropy(
        target_logits(wrapped, batch).flatten(0, 1).float(),
        batch["labels"].flatten(),
        ignore_index=-100,
        reduction="sum",
    )
    loss = loss / step.target_tokens
    if coefficient := model.config.router_aux_loss_coef:
        chosen = [routers.chosen(logits.detach()) for logits in routers.logits]
        balance = balance_loss(routers.logits, batch["attention_mask"], chosen)
        loss = loss + coefficient * balance * len(batch["labels"]) / step.rows
    routers.logits.clear()
    return loss


def target_logits(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[batch, longest target, vocabulary]: what the model says at each of the batch's labels."""
    mask = batch["attention_mask"]
    output = model(
        input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions(mask), use_cache=False,
        num_logits_to_keep=batch["labels"].shape[1] + 1, output_router_logits=False,
    )  # fmt: skip
    return output.logits[:, :-1]


def layer_states(model, batch: dict[str, torch.Tensor]) -> dict[str, tuple[Sequence[torch.Tensor], torch.Tensor]]:
    """{"decoder": (states after each block [batch, tokens, width], which of the tokens are real)}, the targets given."""
    mask = batch["attention_mask"]
    outputs = model.base_model(
        input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions(mask), use_cache=False,
        output_hidden_states=True, output_router_logits=False,
    )  # fmt: skip
    return {"decoder": (outputs.hidden_states[1:], mask.bool())}


def teacher_forced(dataset, tokenizer, constants: SimpleNamespace):
    """Batches of similar length, every row once, in an order that is always the same."""
    return cross_entropy.teacher_forced(dataset, tokenizer, constants, together=join)


def task_loss(model, dataset, tokenizer, constants: SimpleNamespace, accelerator) -> float:
    """Mean cross-entropy of `model` (unwrapped) in nats a target token, end token included; all processes take part."""

    def logits_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return target_logits(model, batch)

    return cross_entropy.mean_loss(model, logits_of, dataset, tokenizer, constants, accelerator, join)
