"""Merging Switch Transformers for CAEM_multi_task_finetune.py: by Algorithm 1, or by a method that pools their experts; and
calibrating the routers of what was merged."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers.models.switch_transformers.caem import merge_lazily, merged_config

from expert_merging.core.safetensors_folder import SafetensorsFolder, write_tensors
from expert_merging.data import features
from expert_merging.merging import registry
from expert_merging.merging.pooled import Bring, layers_of, merge_pools
from expert_merging.merging.registry import POOLED
from expert_merging.merging.router_calibration import slots_of_average, slots_of_chosen
from expert_merging.run.deviations import of_method
from expert_merging.switch import expert_pool, models, router_choices
from expert_merging.switch.usage import STACKS

MERGINGS = ("caem", "average", *POOLED)
CALIBRATIONS = tuple(registry.CALIBRATIONS)


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
    loaders, rows = _loaders_and_inputs(c, sources)
    return expert_pool.observe(weights, loaders, rows, sources[0].tokenizer, c, device)


def _loaders_and_inputs(c: SimpleNamespace, sources: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Of each source a function that loads it, and the first `c.pool_inputs` validation inputs of its task."""
    inputs = [features.load(source.task, c, sources[0].tokenizer)["validation"] for source in sources]
    rows = [one.select(range(min(c.pool_inputs or len(one), len(one)))) for one in inputs]
    return [functools.partial(models.load_model, source.folder, "single-task model") for source in sources], rows


def _pooled(c: SimpleNamespace) -> Bring:
    """The method `c.merging` with its arguments."""
    method = POOLED[c.merging]
    return functools.partial(method.load(), **method.arguments(vars(c)))


def calibrate(
    c: SimpleNamespace, sources: Sequence[Any], folder: Path, record: dict[str, Any], device
) -> dict[str, Any]:
    """Fit the routers of the merged model in `folder` to the choices of `sources` on the inputs that the pooled methods look
    at, and write them there; all other tensors keep their bytes. Returns {layer: how near each came}."""
    method = registry.CALIBRATIONS[c.calibration]
    fit = functools.partial(method.load(), **method.arguments(vars(c)))
    weights = SafetensorsFolder(folder)
    model = models.load_model(folder, "merged model")
    slots = _slots(c, router_choices.by_depth(layers_of(weights)), len(sources), record)
    loaders, rows = _loaders_and_inputs(c, sources)
    found = router_choices.calibrate(model, fit, loaders, rows, slots, sources[0].tokenizer, c, device)
    fitted = {name: model.state_dict()[name].cpu() for name in (f"{layer}.router.classifier.weight" for layer in found)}
    (again := folder / "calibrated").mkdir()
    write_tensors(
        ((name, fitted[name].to(old.dtype) if name in fitted else old) for name, old in weights.items()), again
    )
    for path in weights.files:
        path.unlink()
    for path in again.iterdir():
        path.replace(folder / path.name)
    again.rmdir()
    return {layer: one.record() for layer, one in found.items()}


def _slots(c: SimpleNamespace, layers: list[str], sources: int, record: dict[str, Any]) -> dict[str, list[list[int]]]:
    """The pool's members in each slot of the merged model's sparse `layers` (in order of depth), {layer: [slots]}; what was
    merged is in `record`."""
    experts = c.source_experts_num
    if c.merging == "average":
        return dict.fromkeys(layers, slots_of_average(sources, experts))
    if c.merging in POOLED:
        return record["pool"]
    chosen = [layer for stack in STACKS for layer in record["experts"][stack]]
    return {layer: slots_of_chosen(one, experts) for layer, one in zip(layers, chosen, strict=True)}
