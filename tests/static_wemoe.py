"""WEMoE models with their weights merged for good, as ordinary models: what routed ones are compared with."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from expert_merging.wemoe import seq2seq
from expert_merging.wemoe.ffn import WeightEnsemblingFFN, ensembles
from expert_merging.wemoe.linear import EnsembledLinear


def plain(layer: WeightEnsemblingFFN, weights: torch.Tensor) -> nn.Module:
    """An ordinary layer of the base's class with the weights merged by `weights` [T]."""
    ffn = copy.deepcopy(layer.base, {id(vectors): None for vectors in layer.vectors})  # without the task vectors
    for module in ffn.modules():
        if isinstance(module, EnsembledLinear):  # the reverse of `ensemble`
            module.__class__ = module.plain
            del module.plain, module.deltas, module.routing, module.product
    with torch.no_grad():
        ffn.load_state_dict(layer.merged_parameters(weights), strict=False)
    return ffn


def export_static(model: nn.Module, weights: Mapping[str, torch.Tensor] | torch.Tensor | None = None) -> nn.Module:
    """A copy of `model` as an ordinary model: every weight-ensembling layer merged for good.

    Args:
        weights: of each layer by name, or of all, [T]; None takes the constants of routers of depth 0.

    Raises ValueError when `weights` is None and a router looks at its input.
    """
    merged: dict[int, Any] = {}
    for name, layer in ensembles(model):
        if weights is None and layer.gate.depth > 0:
            raise ValueError(f"{name} is routed by its input; give the weights to merge it by")
        own = layer.gate.bias if weights is None else weights[name] if isinstance(weights, Mapping) else weights
        merged[id(layer)] = plain(layer, own.detach())
    made = copy.deepcopy(model, merged)
    if hasattr(made, "wemoe"):
        del made.wemoe
    return made


def export_seq2seq(model: nn.Module, weights: Mapping[str, torch.Tensor] | torch.Tensor | None = None) -> nn.Module:
    """`export_static` of an encoder-decoder model, without the hooks that route: it saves and loads."""
    made = export_static(model, weights)
    for stack in (made.get_encoder(), made.get_decoder()):
        for key, hook in list(stack._forward_pre_hooks.items()):
            if isinstance(hook, (seq2seq._RouteEncoder, seq2seq._RouteDecoder)):
                del stack._forward_pre_hooks[key], stack._forward_pre_hooks_with_kwargs[key]
    return made
