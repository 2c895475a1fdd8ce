"""Expert usage of a model on a task, as the histories hold it."""

from typing import Any

import torch
from transformers.models.switch_transformers.caem import normalized_entropy

from expert_merging.run import sharding

STACKS = ("encoder", "decoder")


def read_usage(model, accelerator) -> dict[str, list[list[int]]]:
    """{"encoder": [sparse layer][expert] tokens, "decoder": ...} counted since the last reset, over all processes."""
    usage = model.expert_usage()
    if sharding.is_sharded(model):  # every process has seen all examples
        return {stack: usage[stack].tolist() for stack in STACKS}
    return {stack: accelerator.reduce(usage[stack].to(accelerator.device), "sum").tolist() for stack in STACKS}


def layer_entropies(grid: list[list[int]]) -> list[float]:
    """Normalised entropy (paper, eq. of section 3) of each sparse layer's usage, in [0, 1]."""
    return [round(value, 6) for value in normalized_entropy(torch.tensor(grid)).tolist()]


def per_stack(usage: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{task: {stack: grid}} as a history holds it: "usage" and the layers' "entropy", both {stack: {task: ...}}."""
    stacks = list(next(iter(usage.values())))
    grids = {stack: {task: of_task[stack] for task, of_task in usage.items()} for stack in stacks}
    entropies = {stack: {task: layer_entropies(grid) for task, grid in grids[stack].items()} for stack in stacks}
    return {"usage": grids, "entropy": entropies}
