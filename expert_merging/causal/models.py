"""Causal mixtures of experts from disk."""

import warnings
from pathlib import Path
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.hub import first_line, local_folder


def load_model(path: str | Path, constant: str, dtype: Any = "float32"):
    """The causal language model in a local folder or on the hub, with `routers` that watch it (routers.py).

    `constant` named the path; dtype "auto" is that of the files.

    Raises UserError where there is none, it is cut short, lacks a tensor, or is of a family without a layout.
    """
    folder = local_folder(str(path), constant)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from expert_merging.causal.routers import Routers

    # A shared expert of no neuron (tools/upcycle.py) is meant.
    warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
    try:
        model, left = AutoModelForCausalLM.from_pretrained(
            folder or path, torch_dtype=getattr(torch, dtype, dtype), output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        where = f"a whole model in the folder {path}" if folder else f"the folder {path}, nor that model on the hub"
        raise UserError(f"{constant}: did not find {where} ({first_line(error)}); bring the model's folder") from error
    if absent := left["missing_keys"]:
        raise UserError(f"{constant}: {path} lacks {absent[0]}, which {type(model).__name__} has")
    model.routers = Routers(model)
    if not model.routers.layers:
        raise UserError(f"{constant}: {path} has no layer with experts")
    return model
