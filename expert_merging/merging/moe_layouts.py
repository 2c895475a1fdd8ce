"""Where models of several families keep their routers and experts: a few lines of names a family.

A folder may hold each expert's tensors by themselves, or all experts' in one (`experts.gate_up_proj`, `experts.down_proj`, as
transformers 5 has them in memory), with the experts along the first axis. What is no router and no expert, shared experts
and their gates too, is the rest.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.safetensors_folder import Kind


@dataclass(frozen=True)
class Layout:
    """Names of a family: {layer} is what a sparse layer's tensors have in common, {part} what an expert's are told apart by.

    `number` and `chosen` are the lines of config.json for the experts of a layer and for those a token is sent to ("" where it
    is one). Routers have a row an expert.
    """

    layer: str
    routers: tuple[str, ...]
    expert: str = "{layer}.experts.{expert}.{part}"
    number: str = "num_experts"
    chosen: str = "num_experts_per_tok"


_GATE = ("{layer}.gate.weight",)
LAYOUTS = {
    "switch_transformers": Layout(
        r".+\.mlp", ("{layer}.router.classifier.weight", "{layer}.router.classifier.bias"),
        "{layer}.experts.expert_{expert}.{part}", chosen="",
    ),
    "mixtral": Layout(r".+\.(?:block_sparse_moe|mlp)", _GATE, number="num_local_experts"),
    "qwen2_moe": Layout(r".+\.mlp", _GATE),
    "qwen3_moe": Layout(r".+\.mlp", _GATE),
    "olmoe": Layout(r".+\.mlp", _GATE),
    "deepseek_v2": Layout(r".+\.mlp", _GATE, number="n_routed_experts"),
    "deepseek_v3": Layout(
        r".+\.mlp", (*_GATE, "{layer}.gate.e_score_correction_bias"), number="n_routed_experts"
    ),
}  # fmt: skip


@dataclass
class SparseLayer:
    """A layer's tensors: routers [n, ...], each expert's by part, and those that hold all experts' [n, ...]."""

    routers: list[str] = field(default_factory=list)
    experts: dict[str, dict[int, str]] = field(default_factory=dict)  # part -> expert -> name
    fused: list[str] = field(default_factory=list)


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The family's layout. Raises UserError for a family that has none, or routing that another number of experts breaks."""
    family = config.get("model_type")
    if family not in LAYOUTS:
        raise UserError(f"model_type is {family}; experts are known of {', '.join(LAYOUTS)}")
    if (config.get("n_group") or 1) > 1:
        raise UserError(
            f"{family} with n_group {config['n_group']} chooses among groups of experts; experts cannot be taken from one "
            "and another model without breaking the groups"
        )
    return LAYOUTS[family]


def sparse_layers(config: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, SparseLayer]:
    """{layer: its tensors}, in the order of the model, an encoder's before a decoder's.

    Raises UserError as `layout_of`, and where there is no sparse layer, an expert or router is missing, or a layer has
    another number of experts than the configuration says.
    """
    layout = layout_of(config)
    number = config.get(layout.number)
    found: dict[str, SparseLayer] = {}
    forms = [("router", _pattern(layout, one)) for one in layout.routers]
    forms += [("expert", _pattern(layout, layout.expert)), ("fused", _pattern(layout, _FUSED))]
    for name in kinds:
        for role, pattern in forms:
            if match := pattern.fullmatch(name):
                layer = found.setdefault(match["layer"], SparseLayer())
                if role == "expert":
                    layer.experts.setdefault(match["part"], {})[int(match["expert"])] = name
                else:
                    (layer.routers if role == "router" else layer.fused).append(name)
    if not found:
        raise UserError(f"there are no experts under the names that {config['model_type']} models have")
    for prefix, layer in found.items():
        if not layer.routers or not (layer.experts or layer.fused):
            raise UserError(f"{prefix} does not have both experts and a router")
        for part, experts in layer.experts.items():
            if sorted(experts) != list(range(number or 0)):
                raise UserError(f"{prefix} has {part} of experts {_few(experts)}; {layout.number} is {number}")
        for name in (*layer.routers, *layer.fused):
            if kinds[name].shape[:1] != (number,):
                raise UserError(f"{name} is {kinds[name].shape}; {layout.number} is {number}")
    return {prefix: found[prefix] for prefix in sorted(found, key=_place)}


def expert_name(config: Mapping[str, Any], layer: str, expert: int, part: str) -> str:
    """The name of a tensor of an expert."""
    return layout_of(config).expert.format(layer=layer, expert=expert, part=part)


_FUSED = "{layer}.experts.{fused}"
_GROUPS = {"expert": r"(?P<expert>\d+)", "part": r"(?P<part>[a-z_].*)", "fused": r"(?P<fused>gate_up_proj|down_proj)"}


def _pattern(layout: Layout, form: str) -> re.Pattern[str]:
    groups = {"{layer}": f"(?P<layer>{layout.layer})", **{f"{{{name}}}": group for name, group in _GROUPS.items()}}
    return re.compile("".join(groups.get(piece, re.escape(piece)) for piece in re.split(r"(\{\w+\})", form)))


def _place(layer: str) -> tuple[bool, list[int]]:
    return layer.startswith("decoder"), [int(number) for number in re.findall(r"\d+", layer)]


def _few(numbers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(numbers)[:8])) + (", .." if len(numbers) > 8 else "")
