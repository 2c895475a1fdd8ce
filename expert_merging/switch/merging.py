"""Merging Switch Transformers for CAEM_multi_task_finetune.py: by Algorithm 1, or by a method that pools their experts."""

import functools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers.models.switch_transformers.caem import merge_lazily, merged_config

from expert_merging.core.safetensors_folder import SafetensorsFolder
from expert_merging.data import features
from expert_merging.merging.pooled import Bring, merge_pools
from expert_merging.merging.registry import POOLED
from expert_merging.run.deviations import of_method
from expert_merging.switch import expert_pool, models
from expert_merging.switch.usage import STACKS

MERGINGS = ("caem", "average", *POOLED)


def merge(
    c: SimpleNamespace, sources: Sequence[Any], by: list[dict[str, list[float]]] | None, device
) -> tuple[dict[str, Any], Iterator[tuple[str, torch.Tensor]], Any]:
    """(record, tensors, configuration) of the model with `c.target_experts_num` experts a sparse layer.

    Args:
        sources: training.caem_sources.Source.
        by: of each source, per stack and sparse layer, what experts are shared out by; None takes the entropies.

    Returns:
        The record as `caem_sources.merge_sources` describes it; it is full when the last tensor has come.

    Raises ValueError where the sources' tensors do not fit together.
    """
    weights = [SafetensorsFolder(source.folder) for source in sources]
    config, target = sources[0].config, c.target_experts_num
    if c.merging in POOLED:
        members, tensors = merge_pools(weights, _observe(c, device, sources, weights), target, _pooled(c))
        return {"pool": members}, tensors, merged_config(config, target)
    rule, projection = of_method(c.reading, "allocation"), of_method(c.reading, "projection")
    usage = [source.usage for source in sources]
    record, tensors = merge_lazily(weights, usage, target, c.alpha, rule, projection, by)
    noted = ("allocation", "entropies", "experts", "weights")
    return (
        {what: {stack: record[stack][what] for stack in STACKS} for what in noted},
        tensors,
        merged_config(config, target, projection),
    )


def _observe(c: SimpleNamespace, device, sources: Sequence[Any], weights) -> dict[str, Any]:
    """What `c.pool_inputs` validation inputs of each task say of the sources' experts, {layer: observed}."""
    tokenizer = sources[0].tokenizer
    inputs = [features.load(source.task, c, tokenizer)["validation"] for source in sources]
    rows = [one.select(range(min(c.pool_inputs or len(one), len(one)))) for one in inputs]
    loaders = [functools.partial(models.load_model, source.folder, "single-task model") for source in sources]
    return expert_pool.observe(weights, loaders, rows, tokenizer, c, device)


def _pooled(c: SimpleNamespace) -> Bring:
    """The method `c.merging` with its arguments."""
    method = POOLED[c.merging]
    return functools.partial(method.load(), **method.arguments(vars(c)))
