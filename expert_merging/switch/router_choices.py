"""What the sources' routers choose on their own tasks' inputs, and a merged model's routers fitted to that
(merging/router_calibration.py)."""

import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from expert_merging.core.bars import bar
from expert_merging.merging.pooled import layers_of
from expert_merging.merging.router_calibration import Fitted, targets
from expert_merging.switch.expert_pool import batches, real_positions

Fit = Callable[..., tuple[torch.Tensor, Fitted]]
Batches = Sequence[tuple[dict[str, torch.Tensor], torch.Tensor]]


@torch.no_grad()
def calibrate(
    model, fit: Fit, sources: Sequence[Any], inputs: Sequence[Any], slots: Mapping[str, Sequence[Sequence[int]]], tokenizer,
    c: SimpleNamespace, device,
) -> dict[str, Fitted]:  # fmt: skip
    """
    Fit the routers of a merged `model`, in place, to its sources' choices.

    Each source goes over its own task's inputs once, its decoder fed with what it writes greedily; the merged model then goes
    over the same tokens once for each sparse layer, from the first on: what a layer is given depends on the routers before it,
    which are fitted by then. One layer's states of all tokens are held at a time, in float64 while it is fitted.

    Args:
        fit: `router_calibration.calibrated` with its settings.
        sources: of each source, a function that loads the model; one is in memory beside the merged model at a time.
        inputs: of each source, features of its task (input_ids).
        slots: of each sparse layer, by its name, the pool's members in each slot.
        c: eval_batch_size, max_decoder_length.

    Returns:
        {layer: how near its router came}, in the order of the layers.
    """
    layers = by_depth(layers_of(model.state_dict()))
    given: list[Batches] = []
    wanted: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    for number, (load, rows) in enumerate(zip(sources, inputs, strict=True)):
        source = load().to(device).eval()
        given.append(list(batches(source, rows, tokenizer, c, device, f"source {number + 1} writes")))
        gates = _seen(source, layers, _gates, given[-1], f"choices of source {number + 1}")
        for layer in layers:
            wanted[layer].append(targets(gates[layer], number, slots[layer]))
        del source, gates
    model = model.to(device).eval()
    together = [batch for of_source in given for batch in of_source]
    found: dict[str, Fitted] = {}
    for number, layer in enumerate(layers, 1):
        states = _seen(model, [layer], _states, together, f"router {number} of {len(layers)}")[layer]
        sizes = [len(one) for one in wanted[layer]]
        weights = torch.cat([torch.full((size,), 1 / (len(sizes) * size), dtype=torch.float64) for size in sizes])
        router = model.get_submodule(f"{layer}.router.classifier")
        fitted, found[layer] = fit(
            states, torch.cat(wanted.pop(layer)), weights.to(device), router.weight, bias=router.bias
        )
        router.weight.copy_(fitted)
    return found


def by_depth(layers: Sequence[str]) -> list[str]:
    """Names of sparse layers in the order in which a token meets them: the encoder's, then the decoder's."""
    return sorted(layers, key=lambda layer: (layer.startswith("decoder"), int(re.findall(r"block\.(\d+)\.", layer)[0])))


def _states(given: tuple[torch.Tensor, ...], _) -> torch.Tensor:
    return given[0]


def _gates(_, made: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return made[2].softmax(-1)


def _seen(
    model, layers: Sequence[str], value: Callable[..., torch.Tensor], given: Batches, label: str
) -> dict[str, torch.Tensor]:
    """{layer: [real tokens, width]}: `value(what its router was given, what it made of that)`."""
    seen: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    real: dict[str, torch.Tensor] = {}  # of the batch at hand: which positions of each stack count

    def watch(layer: str):
        def note(_, inputs, outputs):
            seen[layer].append(value(inputs, outputs)[real[layer.split(".")[0]]].float())

        return model.get_submodule(f"{layer}.router").register_forward_hook(note)

    hooks = [watch(layer) for layer in layers]
    encoder_only = all(layer.startswith("encoder") for layer in layers)
    for batch, written in bar(given, desc=label):
        real |= real_positions(batch, written, model.config.eos_token_id)
        if encoder_only:
            model.get_encoder()(**batch)
        else:
            model(**batch, decoder_input_ids=written, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(parts) for layer, parts in seen.items()}
