"""LoRA adapters (Hu et al. 2022, section 4.1) as models: the base's tensors with scaled B A added when they are asked for."""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json
from expert_merging.merging.named import Computed, Tensors, wide

# What init_lora_weights begins with where peft takes from the base what it puts into the adapter, or quantises it.
_OTHER_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")


def on_base(base: Tensors, folder: Path, tied: Collection[str] = ()) -> Computed:
    """The base with the adapter in `folder` (peft's): W + s B A in float32 where it has A [r, in] and B [out, r], s being
    alpha / r, with rank-stabilised LoRA alpha / sqrt(r); the adapter's own W where it has one whole (modules_to_save);
    the base's for all else.

    Args:
        tied: names of the base's tensors that are input embedding and output matrix in one.

    Raises UserError where a file is missing or damaged, where the adapter is of another type than LoRA, or DoRA, or was trained
    on weights other than the base's, where it changes one of `tied`, of which peft changes the one use alone, and where it has
    something that does not fit the base or is not known here.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("lora_alpha", 0), (int, float)):
        raise UserError(f"{folder / CONFIG} is no configuration of an adapter")
    kind = config.get("peft_type")
    if kind != "LORA" or config.get("use_dora"):
        raise UserError(
            f"{folder} is an adapter of type {'DoRA' if config.get('use_dora') else kind}; only LoRA is merged"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise UserError(
            f"{folder} began as {start} (init_lora_weights), which changes the base model; save it by peft with "
            "path_initial_model_for_weight_conversion, or merge the whole model that it makes"
        )
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            adapter = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} is missing, cut short or damaged ({error})") from error
    whole, pairs = _parts(adapter, base, folder)
    for name in tied:
        if name in pairs or (name in whole and not torch.equal(wide(whole[name]), wide(base[name]))):
            raise UserError(
                f"{folder} changes {name} as the input embedding alone, and in the base model it is the output matrix too; "
                "give a base that has both (tie_word_embeddings false)"
            )
    scales = {name: _scale(config, name.removesuffix(".weight"), len(pair["A"])) for name, pair in pairs.items()}
    transposed = {n for n, pair in pairs.items() if config.get("fan_in_fan_out") or pair["of"] == "embedding"}
    for name, pair in pairs.items():
        if (found := _product_shape(pair, name in transposed)) != (wanted := tuple(base[name].shape)):
            raise UserError(f"{folder} adds {found} to {name}, which is {wanted} in the base model")

    def compute(name: str) -> torch.Tensor:
        origin = whole[name] if name in whole else base[name]
        if name not in pairs:
            return origin
        product = wide(pairs[name]["B"]) @ wide(pairs[name]["A"])
        return wide(origin).add(product.T if name in transposed else product, alpha=scales[name])

    return Computed(list(base), compute)


def _parts(adapter: Tensors, base: Tensors, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """The adapter's whole tensors, and its pairs {"A", "B", "of"}, by the names of the base's tensors they belong to."""
    whole: dict[str, torch.Tensor] = {}
    pairs: dict[str, dict[str, Any]] = {}
    for name, tensor in adapter.items():
        inner = name.removeprefix(_PREFIX).replace(
            ".base_layer.", "."
        )  # of embeddings that peft saves with their adapter
        match = _PARTS.fullmatch(inner)
        target = f"{match[1]}.weight" if match else inner
        if target not in base or not (match or tensor.shape == base[target].shape):
            raise UserError(f"{folder} has {name}, which has no place in the base model")
        if not match:
            whole[target] = tensor
        elif tensor.dim() != 2:
            raise UserError(f"{folder} has {name} of {tensor.dim()} dimensions; only adapters of matrices are merged")
        else:
            pairs.setdefault(target, {"of": "embedding" if match[2] else "linear"})[match[3]] = tensor
    for target, pair in pairs.items():
        if not {"A", "B"} <= pair.keys() or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"{folder} lacks one of A and B of {target}, or they are not of one rank")
    return whole, pairs


def _product_shape(pair: Mapping[str, torch.Tensor], transposed: bool) -> tuple[int, int]:
    shape = pair["B"].shape[0], pair["A"].shape[1]
    return shape[::-1] if transposed else shape


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What B A of `module` is multiplied by; the first of alpha_pattern's expressions that fits the module's end counts."""
    alpha = config.get("lora_alpha", 8)  # peft's default
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
