"""The output matrix at chosen places only: a vocabulary is wide, and most tokens are a prompt's, whose logits nobody reads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def logits_at(model, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
    """While it lasts, the model's logits are those of the tokens at `rows`, `columns` [places]: [1, places, vocabulary]."""
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: (inputs[0][rows, columns][None],)
    )
    try:
        yield
    finally:
        hook.remove()


def before_targets(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, columns, targets), each [places]: where the tokens that `labels` [batch, tokens] wants are foretold, and those."""
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return rows, columns, labels[rows, columns + 1]
