"""Weighted averages of models, tensor by tensor: plain averaging, soups, points on the line between two models."""

from collections.abc import Iterator, Sequence

import torch
from transformers.models.switch_transformers.caem import Average

from expert_merging.merging.named import Tensors


def simple_average(base: Tensors | None, models: Sequence[Tensors]) -> Iterator[tuple[str, torch.Tensor]]:
    """1/T sum_i theta_i (Wortsman et al. 2022, "Model soups", section 2). `base` has no part in it."""
    return average_lazily(models)


def average(models: Sequence[Tensors], weights: Sequence[float] | None = None) -> dict:
    """The average of state dicts with the same names and shapes, experts slot by slot, as a new state dict.

    Arguments and errors as of `average_lazily`.
    """
    return dict(average_lazily(models, weights))


def average_lazily(
    models: Sequence[Tensors], weights: Sequence[float] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the average, one after another, each made when it is asked for.

    Args:
        models: state dicts, or mappings that read from disk; each tensor is asked for once.
        weights: of each model, adding up to 1; None weighs all the same.

    Returns:
        (name, tensor), in the first model's order and dtypes, added up at least in float32; tensors that are not of
        floating point (positions, counters) are the first model's.

    Raises:
        ValueError: no model; names or shapes that differ; weights that do not fit.
    """
    if not models:
        raise ValueError("there is no model to average")
    weights = [1 / len(models)] * len(models) if weights is None else list(weights)
    if len(weights) != len(models) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"{len(weights)} weights adding up to {sum(weights)} for {len(models)} models")
    for i, model in enumerate(models[1:], start=1):
        if differing := sorted(set(model) ^ set(models[0])):
            raise ValueError(f"models 0 and {i} are not of one shape: only one of them has {differing[0]}")
    for name in models[0]:
        first = models[0][name]
        if not first.is_floating_point():
            yield name, first.clone()
            continue
        average_of_name = Average(name)
        for i, (model, weight) in enumerate(zip(models, weights, strict=True)):
            average_of_name.add(first if i == 0 else model[name], weight)
        yield name, average_of_name.result()
