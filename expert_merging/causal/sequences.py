"""Input and target in one sequence, padded on the left: the targets of a batch then stand in its last columns, so that the
output matrix is needed for these only."""

from collections.abc import Sequence
from typing import Any

import torch


def join(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch of examples with input_ids (at least one) and labels.

    Returns {"input_ids" and "attention_mask" [batch, tokens], "labels" [batch, longest target]: those of the last columns,
    -100 where there is the input}.
    """
    inputs = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    targets = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
    both = [torch.cat(pair) for pair in zip(inputs, targets, strict=True)]
    return {
        "input_ids": _on_the_right(both, pad_token_id),
        "attention_mask": _on_the_right([torch.ones_like(ids) for ids in both], 0),
        "labels": _on_the_right(targets, -100),
    }


def shifted(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch that is padded on the right, padded on the left."""
    lengths = attention_mask.sum(dim=1, keepdim=True)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    order = (places + lengths) % input_ids.shape[1]
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """[batch, tokens]: the place of each real token among the real ones; 0 for padding before them."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def _on_the_right(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    made = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for number, row in enumerate(rows):
        made[number, made.shape[1] - len(row) :] = row
    return made
