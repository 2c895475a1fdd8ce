"""Fisher merging (Matena and Raffel 2022, section 3): an average weighted, entry by entry, by the diagonal Fisher."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from expert_merging.merging.named import Tensors, check_alike, rebuilt, same_shape, wide


def fisher(
    base: Tensors, models: Sequence[Tensors], information: Sequence[Tensors], floor: float = 1e-6
) -> Iterator[tuple[str, torch.Tensor]]:
    """sum_i a_i (F_i + floor) theta_i / sum_i a_i (F_i + floor), with a_i = 1 / (|F_i| + floor), scaled to add up to 1.

    Args:
        information: F_i, of each model what `diagonal_fisher` gives; tensors it lacks are plainly averaged.
            |F_i| is its L2 norm over the whole model, so that a model with large gradients does not outweigh the others.

    Raises ValueError where the models do not fit together or there is not one F a model.
    """
    check_alike(base, models)
    if len(information) != len(models):
        raise ValueError(f"there are {len(models)} models and {len(information)} Fisher matrices")
    norms = [sum(wide(tensor).square().sum().item() for tensor in one.values()) ** 0.5 for one in information]
    weights = [1 / (norm + floor) for norm in norms]
    weights = [weight / sum(weights) for weight in weights]

    def make(name: str) -> torch.Tensor:
        origin = base[name]
        tensors = [wide(same_shape(name, origin, m[name], i)).to(origin.device) for i, m in enumerate(models)]
        if any(name not in one for one in information):
            return sum(tensors) / len(tensors)
        certainty = [
            a * (wide(one[name]).to(origin.device) + floor) for a, one in zip(weights, information, strict=True)
        ]
        return sum(f * x for f, x in zip(certainty, tensors, strict=True)) / sum(certainty)

    return rebuilt(base, make)


def diagonal_fisher(
    model: torch.nn.Module, batches: Iterable[Any],
    logits_of: Callable[[torch.nn.Module, Any], tuple[torch.Tensor, int]],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """An estimate of the diagonal Fisher information: sum over batches of (d/d theta sum_x sum_c sqrt(p_c) log p_c)^2 /
    examples, with sqrt(p_c) held constant. The square of that sum is E_c[(d log p_c)^2] and products between classes,
    and in batches of several examples products between those, as the released codes have it.

    Args:
        logits_of: (model, batch) -> (logits [predictions, classes], examples in the batch).

    Returns:
        {name of the parameter: tensor of its shape}; the model has no gradients afterwards.
    """
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    examples = 0
    for batch in batches:
        model.zero_grad(set_to_none=True)
        logits, count = logits_of(model, batch)
        log_p = logits.float().log_softmax(dim=-1)
        (log_p.detach().exp().sqrt() * log_p).sum().backward()
        examples += count
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.square()
    model.zero_grad(set_to_none=True)
    return {name: tensor / max(examples, 1) for name, tensor in total.items()}
