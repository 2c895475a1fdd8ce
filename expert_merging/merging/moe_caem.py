"""CAEM (Algorithm 1) with one stack, on Hugging Face folders of any family in moe_layouts.py (tools/merge.py --method caem).

The encoder and the decoder of a Switch Transformer are one stack here; CAEM_multi_task_finetune.py has one for each, as the
paper does. A router over another number of experts gives other probabilities: joint fine-tuning is what comes next.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.models.switch_transformers.caem import Average, share_out

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json
from expert_merging.core.safetensors_folder import Kind
from expert_merging.core.safetensors_stream import DTYPES
from expert_merging.merging import lora
from expert_merging.merging.from_folders import Merged
from expert_merging.merging.model_folders import Source, check_shapes
from expert_merging.merging.moe_layouts import SparseLayer, expert_name, layout_of, sparse_layers
from expert_merging.merging.registry import Method

CAEM = Method("caem", "CAEM", settings={"alpha": 1.0}, sees="expert usage")


def check_request(method: str, usage: Sequence[str], experts: int, common_rows: bool) -> None:
    """Raises UserError where what only CAEM takes is given to another `method`, or the other way round, and where a file of
    usage is not there."""
    if method == "caem" and common_rows:
        raise UserError("caem takes models of one vocabulary; leave --common_rows out")
    if method == "caem" and experts < 1:
        raise UserError(f"--experts is {experts}; caem wants the number of experts in a sparse layer of the result")
    if method != "caem" and (any(usage) or experts):
        raise UserError(f"{method} does not look at usage or numbers of experts; leave --usage and --experts out")
    for path in filter(None, usage):
        if not Path(path).is_file():
            raise UserError(f"{path} does not exist; give --usage U1.json U2.json .., one a model")


def read_usage(paths: Sequence[str], models: Sequence[Source], layers: int, experts: int) -> list[torch.Tensor]:
    """Tokens sent to each expert on validation, float64 [layers, experts] for each of `models`, from a file of `paths` each:
    {"layers": [[count, ..], ..]}.

    Raises UserError where a file is missing or damaged, of another shape, or has a count that is none; and where it says
    (as those of tools/count_moe_usage.py do) that other weights were counted.
    """
    read = []
    for path, model in zip(paths, models, strict=True):
        if not path:
            raise UserError("caem shares experts out by their use; give --usage U1.json U2.json .., one a model")
        content = read_json(Path(path))
        try:
            counts = torch.tensor(content["layers"], dtype=torch.float64)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f'{path} must hold {{"layers": [[count of each expert], ..]}}') from error
        if tuple(counts.shape) != (layers, experts):
            raise UserError(f"{path} has counts of shape {tuple(counts.shape)}; the models' are [{layers}, {experts}]")
        if not (counts.isfinite() & (counts >= 0)).all() or not counts.any():
            raise UserError(f"{path} has counts below 0 or not finite, or none above 0")
        _check_counted(path, content, model)
        read.append(counts)
    return read


def _check_counted(path: str, content: dict[str, Any], model: Source) -> None:
    """Raises UserError where a file of usage names weights, and they are not the model's."""
    identity = content.get("identity")
    counted = identity.get("weights") if isinstance(identity, dict) else None
    # An adapter has no router to count: it was counted in the model that it makes.
    if not isinstance(counted, dict) or any(file.name == lora.WEIGHTS for file in model.files):
        return
    if sorted(map(str, counted.values())) != sorted(model.sha256().values()):
        raise UserError(
            f"{path} was counted of other weights than those in {model.folder}: give that model's, or count again"
        )


def merge(
    base: Source | None, models: Sequence[Source], usage: Sequence[str], experts: int, alpha: float = 1.0,
    moved: Callable[[int], object] = lambda _: None,
) -> Merged:  # fmt: skip
    """`merge_counted` of the usage in files, one a model (`read_usage`).

    Raises UserError where models, usage or numbers do not fit.
    """
    template = base or models[0]
    layers, number = sparse_layers(template.config, template.kinds), template.config[layout_of(template.config).number]
    if len(usage) != len(models):
        if any(usage):
            raise UserError(f"there are {len(usage)} files of usage for {len(models)} models")
        usage = [""] * len(models)
    check_shapes([*([base] if base else []), *models], common_rows=None)
    return merge_counted(base, models, read_usage(usage, models, len(layers), number), experts, alpha, moved=moved)


def check_chosen(config: Mapping[str, Any], experts: int, constant: str) -> None:
    """Raises UserError, naming `constant`, where a token is to be sent to more experts than `experts`."""
    layout = layout_of(config)
    k = config.get(layout.chosen, 1) if layout.chosen else 1
    if experts < k:
        raise UserError(f"a token is sent to {k} experts ({layout.chosen}); {constant} is {experts}")


def merge_counted(
    base: Source | None, models: Sequence[Source], counts: Sequence[torch.Tensor], experts: int, alpha: float = 1.0,
    rule: str = "paper", by: Sequence[Sequence[float]] | None = None, moved: Callable[[int], object] = lambda _: None,
) -> Merged:  # fmt: skip
    """One model with `experts` experts a sparse layer out of models of one family.

    In each layer the normalised entropies of the models' usage share out the experts (`allocate_experts`); of each model
    the most used come over with their rows of the router, models in order and experts in order of usage. All else, embeddings
    and shared experts too, is averaged with the weights w_i = N_i / sum_k N_k, N_i being all experts of model i in the result.

    Args:
        base: gives configuration and tokenizer; None takes the first model's.
        counts: tokens sent to each expert, [sparse layers, n], of each model.
        alpha, rule, by: see `share_out`.
        moved: called with numbers of tensors of the models that are done with.

    Raises UserError where models or numbers do not fit, or a token is to be sent to more experts than there are.
    """
    template = base or models[0]
    check_shapes([*([base] if base else []), *models], common_rows=None)
    layers, layout = sparse_layers(template.config, template.kinds), layout_of(template.config)
    number = template.config[layout.number]
    check_chosen(template.config, experts, "--experts")
    try:
        shared = share_out(counts, number, experts, alpha, rule, by)
    except ValueError as error:
        raise UserError(f"caem: {error}") from error
    allocation, chosen, weights = (shared[name] for name in ("allocation", "experts", "weights"))

    found = Merged(_kinds(template, layers, experts), iter(()), config={layout.number: experts}, shared=shared)
    for prefix, layer in zip(layers, allocation, strict=True):
        shares = ", ".join(f"{model.folder.name} {a}" for model, a in zip(models, layer, strict=True))
        found.said.append(f"{prefix}: experts from {shares}")
    parts = ", ".join(f"{model.folder.name} {w:.3f}" for model, w in zip(models, weights, strict=True))
    found.said.append(f"all else averaged with weights {parts}")

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        found.counts |= {"merged": 0, "copied": 0, "left out": 0}
        special = _names(layers.values())
        for name in (name for name in template.kinds if name not in special):
            floating = DTYPES[template.kinds[name].dtype].is_floating_point
            found.counts["merged" if floating else "copied"] += 1
            yield name, _average(name, models, weights) if floating else template.tensors[name].clone()
            moved(len(models))
        for (prefix, layer), taken in zip(layers.items(), chosen, strict=True):
            for name, tensor in _copied(template.config, models, prefix, layer, taken):
                found.counts["copied"] += 1
                yield name, tensor
            found.counts["left out"] += len(layer.experts) * (len(models) * number - experts)
            moved(len(models) * len(_names([layer])))

    found.tensors = ((name, tensor.to(DTYPES[found.kinds[name].dtype])) for name, tensor in tensors())
    return found


def _average(name: str, models: Sequence[Source], weights: Sequence[float]) -> torch.Tensor:
    average = Average(name)
    for model, weight in zip(models, weights, strict=True):
        average.add(model.tensors[name], weight)
    return average.result()


def _copied(
    config: Mapping[str, Any], models: Sequence[Source], prefix: str, layer: SparseLayer, taken: Sequence[Sequence[int]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A layer's routers and experts: of model i the experts `taken[i]`, one model after the other."""
    for name in (*layer.routers, *layer.fused):
        yield name, torch.cat([model.tensors[name][experts] for model, experts in zip(models, taken, strict=True)])
    slots = [(model, expert) for model, experts in zip(models, taken, strict=True) for expert in experts]
    for part, names in layer.experts.items():
        for slot, (model, expert) in enumerate(slots):
            yield expert_name(config, prefix, slot, part), model.tensors[names[expert]]


def _names(layers: Iterable[SparseLayer]) -> set[str]:
    """All names of routers and experts in `layers`."""
    experts = {name for layer in layers for names in layer.experts.values() for name in names.values()}
    return experts | {name for layer in layers for name in (*layer.routers, *layer.fused)}


def _kinds(template: Source, layers: Mapping[str, SparseLayer], experts: int) -> dict[str, Kind]:
    """What the result's tensors will be."""
    special = _names(layers.values())
    kinds = {name: kind for name, kind in template.kinds.items() if name not in special}
    for prefix, layer in layers.items():
        for name in (*layer.routers, *layer.fused):
            kinds[name] = Kind(template.kinds[name].dtype, (experts, *template.kinds[name].shape[1:]))
        for part, names in layer.experts.items():
            kinds |= {expert_name(template.config, prefix, i, part): template.kinds[names[0]] for i in range(experts)}
    return kinds
