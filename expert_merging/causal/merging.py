"""Algorithm 1 with one stack, for CAEM_multi_task_finetune.py; merging/moe_caem.py does it on folders."""

import copy
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from expert_merging.merging import moe_caem
from expert_merging.merging.model_folders import open_source
from expert_merging.merging.moe_layouts import layout_of
from expert_merging.run.deviations import of_method

STACKS = ("decoder",)
MERGINGS = ("caem", "average")
CALIBRATIONS = ()


def merge(
    c: SimpleNamespace, sources: Sequence[Any], by: list[dict[str, list[float]]] | None, device
) -> tuple[dict[str, Any], Iterator[tuple[str, torch.Tensor]], Any]:
    """(record, tensors, configuration) of the model with `c.target_experts_num` experts a sparse layer.

    Args:
        sources: training.caem_sources.Source.
        by: of each source, per stack and sparse layer, what experts are shared out by; None takes the entropies.

    Raises UserError where a token is to be sent to more experts than there will be, or the sources do not fit together.
    """
    (stack,) = STACKS
    models, counts = [open_source(source.folder) for source in sources], [source.usage[stack] for source in sources]
    rule, shares = of_method(c.reading, "allocation"), [one[stack] for one in by] if by else None
    merged = moe_caem.merge_counted(None, models, counts, c.target_experts_num, c.alpha, rule, shares)
    config = copy.deepcopy(sources[0].config)
    setattr(config, layout_of(config.to_dict()).number, c.target_experts_num)
    record = {what: {stack: merged.shared[what]} for what in ("allocation", "entropies", "experts", "weights")}
    return record, merged.tensors, config
