"""A dense Llama folder as a mixture of experts (tools/upcycle.py): sparse upcycling (arXiv 2212.05055), a tensor at a time.

Every feed-forward part stands in each expert, behind a fresh router. The weights of the chosen experts sum to 1, so equal
experts give what the dense part gave, whatever the router says. With experts in every layer it becomes a Mixtral; where some
layers stay dense a Qwen2-MoE, which is a Llama but for biases of queries, keys and values (zero here) and an expert that all
tokens share (of no neuron here).
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, MixtralConfig, Qwen2MoeConfig

from expert_merging.core.errors import UserError
from expert_merging.core.files import is_there, new_folder, read_json, sha256, write_json
from expert_merging.core.part_files import read_part_file
from expert_merging.core.safetensors_folder import Kind
from expert_merging.core.safetensors_stream import DTYPES, write_stream
from expert_merging.merging.from_folders import copy_beside_weights
from expert_merging.merging.model_folders import Source

ROUTER_STD = 0.02
RECORD = "upcycled.json"  # in the folder made: what of and how
_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # Mixtral's names; Qwen2-MoE's are Llama's
Config = Any  # MixtralConfig or Qwen2MoeConfig
_FFN = re.compile(rf"model\.layers\.(\d+)\.mlp\.({'|'.join(_PARTS)})\.weight")
_KEPT = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "rope_theta", "attention_dropout",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype",
)  # fmt: skip


def sparse_config(dense: Source, experts: int, chosen: int, every: int = 1) -> Config:
    """The configuration of what `dense` becomes, its experts as wide as the dense feed-forward parts.

    Args:
        every: the last of so many layers gets experts: of 3 the third, the sixth and so on. 1: all, in a Mixtral.

    Raises UserError for what is no Llama or has what Mixtral has not: biases, scaled rotary positions, heads of another
    width than hidden_size / num_attention_heads; for a layer that lacks its feed-forward part, and for numbers of experts or
    layers that cannot be.
    """
    family = dense.config.get("model_type")
    if family != "llama":
        raise UserError(f"{dense.folder}: model_type is {family}; only a llama becomes a Mixtral")
    if not 1 <= chosen <= experts:
        raise UserError(f"a token is sent to chosen {chosen} of experts {experts}; it must be 1 to {experts}")
    rope = dense.config.get("rope_parameters") or dense.config.get("rope_scaling") or {}
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise UserError(f"{dense.folder}: rotary positions are scaled ({kind}), which Mixtral does not know")
    config = LlamaConfig(**dense.config)  # with the defaults of what config.json leaves out, which are not Mixtral's
    biases = [name for name in dense.kinds if re.search(r"\.(mlp|self_attn)\..*\.bias$", name)]
    for line in ("mlp_bias", "attention_bias"):
        if getattr(config, line):
            raise UserError(f"{dense.folder}: {line} is true; Mixtral has no biases")
    if biases:
        raise UserError(f"{dense.folder} has {biases[0]}; Mixtral has no biases")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UserError(
            f"{dense.folder}: {config.num_attention_heads} heads of width {config.head_dim} are not hidden_size "
            f"{config.hidden_size}, as Mixtral's are"
        )
    for name, shape in _ffn_shapes(config).items():
        if name not in dense.kinds or dense.kinds[name].shape != shape:
            found = dense.kinds[name].shape if name in dense.kinds else "absent"
            raise UserError(f"{dense.folder}: {name} is {found}; by config.json it is {shape}")
    if not 1 <= every <= config.num_hidden_layers:
        raise UserError(
            f"every is {every}; of {config.num_hidden_layers} layers it may be 1 to {config.num_hidden_layers}"
        )
    kept = {name: getattr(config, name) for name in _KEPT}
    kept["rope_theta"] = dense.config.get("rope_theta", rope.get("rope_theta", config.rope_theta))
    if every > 1:
        return Qwen2MoeConfig(
            **kept, intermediate_size=config.intermediate_size, moe_intermediate_size=config.intermediate_size,
            shared_expert_intermediate_size=0, decoder_sparse_step=every, norm_topk_prob=True, num_experts=experts,
            num_experts_per_tok=chosen, architectures=["Qwen2MoeForCausalLM"],
        )  # fmt: skip
    return MixtralConfig(
        **kept, intermediate_size=config.intermediate_size, sliding_window=None, num_local_experts=experts,
        num_experts_per_tok=chosen, architectures=["MixtralForCausalLM"],
    )  # fmt: skip


def sparse_layers(config: Config) -> list[int]:
    """The layers with experts."""
    step = 1 if isinstance(config, MixtralConfig) else config.decoder_sparse_step
    return list(range(step - 1, config.num_hidden_layers, step))


def neurons(config: Config) -> int:
    """Of each expert."""
    return getattr(config, _width_of(config))


def _width_of(config: Config) -> str:
    return "intermediate_size" if isinstance(config, MixtralConfig) else "moe_intermediate_size"


def read_parts(folder: Path, layers: Sequence[int], number: int, experts: int) -> dict[int, list[torch.Tensor]]:
    """The neurons of each expert of each of `layers`, int64 [size], ascending, from the files `{layer}.part.{experts}`.

    A neuron may stand in several experts or in none.

    Raises UserError as `read_part_file` does, where a file has other than `number` lines, one a neuron, and where experts are
    not all of one size, as Mixtral's must be.
    """
    if missing := [layer for layer in layers if not (folder / f"{layer}.part.{experts}").exists()]:
        raise UserError(
            f"{folder} has no {missing[0]}.part.{experts}; neighbours/HEMoE_moe_construction.py writes all that are asked for "
            f"here with --moe_layers {' '.join(map(str, layers))}"
        )
    found = {}
    for layer in layers:
        path = folder / f"{layer}.part.{experts}"
        groups, neurons_there = read_part_file(path, experts)
        if neurons_there != number:
            raise UserError(f"{path} has {neurons_there} lines; the model has {number} neurons a layer")
        found[layer] = [torch.tensor(group, dtype=torch.int64) for group in groups]
    sizes = sorted({len(expert) for experts_of in found.values() for expert in experts_of})
    if len(sizes) > 1 or not sizes[0]:
        raise UserError(
            f"{folder}: experts have {sizes[0]} to {sizes[-1]} neurons; in a Mixtral all have one size, above 0"
        )
    return found


def tensors(
    dense: Source, config: Config, parts: Mapping[int, Sequence[torch.Tensor]] | None, noise: float, seed: int,
    moved: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Kind], Iterator[tuple[str, torch.Tensor]]]:  # fmt: skip
    """What the mixture's tensors are, and these one after the other, in the dense model's dtypes.

    Args:
        config: gets the experts' width where there are `parts`.
        parts: neurons of each expert of each sparse layer (`read_parts`), all of one size; None copies all into each.
        noise: standard deviation of what is added to each expert's tensors, over that of the dense tensor.
        seed: of noise and routers; each tensor has random numbers of its own.
        moved: called whenever a tensor of the dense model has been dealt with.
    """
    names = _Mixtral if isinstance(config, MixtralConfig) else _Qwen
    layers, width = sparse_layers(config), config.hidden_size
    experts = config.num_local_experts if isinstance(config, MixtralConfig) else config.num_experts
    if parts is not None:
        setattr(config, _width_of(config), len(parts[layers[0]][0]))
    width_of_expert = neurons(config)
    kinds: dict[str, Kind] = {}
    zeros: dict[str, Kind] = {}

    def sparse(name: str) -> re.Match[str] | None:
        match = _FFN.fullmatch(name)
        return match if match and int(match[1]) in layers else None

    for name, kind in dense.kinds.items():
        if match := sparse(name):
            shape = (width, width_of_expert) if match[2] == "down_proj" else (width_of_expert, width)
            kinds |= {names.expert(match[1], match[2], e): Kind(kind.dtype, shape) for e in range(experts)}
            zeros |= names.empty(match[1], match[2], Kind(kind.dtype, shape))
            if match[2] == "gate_proj":
                kinds[names.router(match[1])] = Kind(kind.dtype, (experts, width))
        elif not name.endswith("rotary_emb.inv_freq"):  # of old folders; made anew by the model
            kinds[name] = kind
            zeros |= names.biases(name, kind)
    kinds |= zeros

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name in dense.kinds:
            if match := sparse(name):
                tensor = dense.tensors[name]
                for e in range(experts):
                    own, target = tensor, names.expert(match[1], match[2], e)
                    if parts is not None:
                        own = tensor.index_select(int(match[2] == "down_proj"), parts[int(match[1])][e])
                    if noise:
                        own = (own + noise * tensor.float().std() * _normal(own.shape, seed, target)).to(tensor.dtype)
                    yield target, own
                if match[2] == "gate_proj":
                    router = ROUTER_STD * _normal((experts, width), seed, names.router(match[1]))
                    yield names.router(match[1]), router.to(tensor.dtype)
            elif name in kinds:
                yield name, dense.tensors[name]
            moved()
        for name, kind in zeros.items():
            yield name, torch.zeros(kind.shape, dtype=DTYPES[kind.dtype])

    return kinds, stream()


class _Mixtral:
    """The names of what a Llama has not."""

    @staticmethod
    def expert(layer: str, part: str, expert: int) -> str:
        return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{_PARTS[part]}.weight"

    @staticmethod
    def router(layer: str) -> str:
        return f"model.layers.{layer}.block_sparse_moe.gate.weight"

    @staticmethod
    def empty(layer: str, part: str, kind: Kind) -> dict[str, Kind]:
        """What is nothing but zeros beside the experts."""
        return {}

    @staticmethod
    def biases(name: str, kind: Kind) -> dict[str, Kind]:
        """Likewise, of the dense tensor `name`."""
        return {}


class _Qwen(_Mixtral):
    @staticmethod
    def expert(layer: str, part: str, expert: int) -> str:
        return f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"

    @staticmethod
    def router(layer: str) -> str:
        return f"model.layers.{layer}.mlp.gate.weight"

    @staticmethod
    def empty(layer: str, part: str, kind: Kind) -> dict[str, Kind]:
        rows, columns = kind.shape
        shape = (rows, 0) if part == "down_proj" else (0, columns)
        made = {f"model.layers.{layer}.mlp.shared_expert.{part}.weight": Kind(kind.dtype, shape)}
        if part == "gate_proj":
            made[f"model.layers.{layer}.mlp.shared_expert_gate.weight"] = Kind(kind.dtype, (1, columns))
        return made

    @staticmethod
    def biases(name: str, kind: Kind) -> dict[str, Kind]:
        if not re.search(r"self_attn\.[qkv]_proj\.weight$", name):
            return {}
        return {name.removesuffix("weight") + "bias": Kind(kind.dtype, kind.shape[:1])}


def _ffn_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    rows = {"gate_proj": (config.intermediate_size, config.hidden_size)}
    rows |= {"up_proj": rows["gate_proj"], "down_proj": rows["gate_proj"][::-1]}
    return {f"model.layers.{l}.mlp.{p}.weight": rows[p] for l in range(config.num_hidden_layers) for p in _PARTS}


def _normal(shape: Sequence[int], seed: int, name: str) -> torch.Tensor:
    """Standard normal numbers, float32, that follow from the seed and the tensor's name alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.randn(*shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:6])))


def record(
    dense: Source, experts: int, chosen: int, every: int, noise: float, parts: Path | None, seed: int
) -> dict:  # fmt: skip
    """What the folder is made of and how, as JSON values."""
    files = sorted(parts.glob(f"*.part.{experts}")) if parts else []
    return {
        "weights_sha256": dense.sha256(), "config_sha256": sha256(dense.folder / "config.json"), "experts": experts,
        "chosen": chosen, **({"every": every} if every > 1 else {}), "noise": noise, "seed": seed,
        "parts_sha256": {path.name: sha256(path) for path in files},
    }  # fmt: skip


def is_done(out: Path, wanted: dict) -> bool:
    """Whether `out` is there, made as `wanted` says. Raises UserError where it is something else."""
    return is_there(out, lambda: (out / RECORD).is_file() and read_json(out / RECORD) == wanted)


def write(dense: Source, config: Config, kinds: dict[str, Kind], stream, made: dict, out: Path) -> None:
    """Write the folder `out`: weights, configuration, the dense model's tokenizer, the record `made`; all or nothing."""
    with new_folder(out) as temporary:
        write_stream(stream, kinds, temporary)
        copy_beside_weights(dense.folder, temporary)
        write_json(temporary / "config.json", config.to_diff_dict())
        write_json(temporary / RECORD, made)
