"""WEMoE for T5 and Switch Transformers: routing that sees neither padding nor the future.

An encoder layer's weights are the mean of its router's over the real tokens that enter it. A decoder layer's are the same
mean over the encoder's output: they are there before the first token is written and stay, so that a token's logits depend
on nothing behind it, cached and uncached decoding agree, and every beam has the same. Each layer, sparse or dense, is one:
all experts of a Switch layer and the classifier that chooses among them share the weights.
"""

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from expert_merging.merging.named import Computed, tied_names
from expert_merging.wemoe import ffn


def upscale(model: nn.Module, experts: Sequence[nn.Module | Mapping[str, torch.Tensor]], **settings) -> nn.Module:
    """`ffn.upscale` of an encoder-decoder model, with the routing above. `settings` as there.

    `experts` may be files' tensors, which hold tied ones once. Raises ValueError as `ffn.upscale`, and where `model` has
    no encoder and decoder.
    """
    experts = [one if isinstance(one, nn.Module) else with_tied_names(one, model) for one in experts]
    return route(ffn.upscale(model, experts, **settings))


def with_tied_names(tensors: Mapping[str, torch.Tensor], model: nn.Module) -> Mapping[str, torch.Tensor]:
    """`tensors` under all the names of the model's state dict, as far as its ties tell."""
    own = {name: first for first, others in tied_names(model.state_dict()).items() for name in (first, *others)}
    at = {name: name if name in tensors else first for name, first in own.items()}
    return Computed([name for name, place in at.items() if place in tensors], lambda name: tensors[at[name]])


def route(model: nn.Module) -> nn.Module:
    """Let an up-scaled encoder-decoder model route as described above; returns it. To be called after `checkpoints.load`."""
    encoder, decoder = (getattr(model, f"get_{name}", lambda: None)() for name in ("encoder", "decoder"))
    if encoder is None or decoder is None:
        raise ValueError(f"{type(model).__name__} has no encoder and decoder")
    hooks: list[_RouteEncoder | _RouteDecoder] = [_RouteEncoder(), _RouteDecoder()]
    for stack, hook in zip((encoder, decoder), hooks, strict=True):
        hook.layers = [layer for _, layer in ffn.ensembles(stack)]
        stack.register_forward_pre_hook(hook, with_kwargs=True)
    return model


def routing_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """{layer: weights [batch, T]} of the last pass."""
    return {name: layer.last_weights for name, layer in ffn.ensembles(model)}


class _RouteEncoder:
    """Tells the layers of the encoder which tokens are real. An object, so that a copy of the model has its own."""

    layers: list[ffn.WeightEnsemblingFFN]

    def __call__(self, stack: nn.Module, args: tuple, kwargs: dict) -> None:
        given = inspect.signature(stack.forward).bind(*args, **kwargs).arguments
        for layer in self.layers:
            layer.token_mask = given.get("attention_mask")


class _RouteDecoder:
    """Gives the layers of the decoder their weights, from the encoder's output.

    While decoding, the same output comes with every step: the weights are computed once. Several rows in a row, the beams
    of an example, may share one row of it. With routing by batch the weights of the first token stay, whoever leaves.
    """

    layers: list[ffn.WeightEnsemblingFFN]
    states: torch.Tensor | None = None
    rows: int = 0

    def __call__(self, stack: nn.Module, args: tuple, kwargs: dict) -> None:
        given = inspect.signature(stack.forward).bind(*args, **kwargs).arguments
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is None:
            raise ValueError("the decoder routes by the encoder's output; give encoder_hidden_states")
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        if states is self.states and len(tokens) == self.rows and not torch.is_grad_enabled():
            return
        self.states, self.rows = None if torch.is_grad_enabled() else states, len(tokens)
        for layer in self.layers:
            if layer.routing == "batch":
                if not _past_length(given.get("past_key_values")):
                    layer.given_weights = layer.gate.of_sequences(states, mask).mean(dim=0, keepdim=True)
            else:
                weights = layer.gate.of_sequences(states, mask)  # at depth 0 one row for all
                beams = len(tokens) // len(states) if len(weights) == len(states) else 1
                layer.given_weights = weights.repeat_interleave(beams, dim=0)


def _past_length(cache) -> int:
    """Tokens that a decoder's cache holds."""
    if cache is None:
        return 0
    return cache.get_seq_length() if hasattr(cache, "get_seq_length") else cache[0][0].shape[2]
