"""RegMean (Jin et al. 2023, section 3): for each linear layer the weight that comes closest to all models' outputs."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from expert_merging.merging.named import Tensors, check_alike, rebuilt, same_shape, wide


def regmean(
    base: Tensors, models: Sequence[Tensors], grams: Sequence[Tensors], off_diagonal: float = 0.6, ridge: float = 1e-6
) -> Iterator[tuple[str, torch.Tensor]]:
    """W = [(sum_i G_i)^-1 sum_i G_i W_i^T]^T for the weights of linear layers, the plain average for all else.

    Args:
        grams: G_i = X^T X / tokens of each layer's inputs, of each model what `gram_matrices` gives: {layer: [in, in]}.
        off_diagonal: factor on the entries of G_i off its diagonal (the paper's alpha).
        ridge: share of its mean diagonal that is added to that of each G_i, so that directions in which no input lies
            keep the average where the sum would be singular. An expert that no task uses is averaged. 0 is the paper's.

    Raises ValueError where the models do not fit together or there is not one set of matrices a model.
    """
    check_alike(base, models)
    if len(grams) != len(models):
        raise ValueError(f"there are {len(models)} models and {len(grams)} sets of Gram matrices")

    def make(name: str) -> torch.Tensor:
        origin = base[name]
        tensors = [wide(same_shape(name, origin, m[name], i)).to(origin.device) for i, m in enumerate(models)]
        layer = name.removesuffix(".weight")
        if layer == name or any(layer not in one for one in grams):
            return sum(tensors) / len(tensors)
        left = [_prepared(one[layer].double().to(origin.device), off_diagonal) for one in grams]
        if not (total := sum(left)).any():
            return sum(tensors) / len(tensors)
        # The same addition for every model, whatever the size of its inputs: it pulls towards the plain average.
        addition = ridge * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype, device=total.device)
        left = [one + addition for one in left]
        right = sum(one @ tensor.double().T for one, tensor in zip(left, tensors, strict=True))
        return torch.linalg.solve(sum(left), right).T.contiguous().to(tensors[0].dtype)

    return rebuilt(base, make)


def _prepared(gram: torch.Tensor, off_diagonal: float) -> torch.Tensor:
    return off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())


@torch.no_grad()
def gram_matrices(
    model: torch.nn.Module, batches: Iterable[Any], run: Callable[[torch.nn.Module, Any], Any]
) -> dict[str, torch.Tensor]:
    """{layer: X^T X / tokens [in, in]} for every `torch.nn.Linear` that saw a token, over `run(model, batch)` of all batches.

    Every position counts, padding too: give batches without.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}

    def watch(name: str) -> Callable:
        def hook(module, inputs):
            states = inputs[0].detach().flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + states.T @ states
            tokens[name] = tokens.get(name, 0) + len(states)

        return hook

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                hooks.callback(module.register_forward_pre_hook(watch(name)).remove)
        for batch in batches:
            run(model, batch)
    return {
        name: sums[name] / tokens[name] if name in sums else module.weight.new_zeros([module.in_features] * 2)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
