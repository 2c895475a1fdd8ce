# Licensed under the Apache License, Version 2.0: see the LICENSE file, or http://www.apache.org/licenses/LICENSE-2.0
"""
CAEM, complexity-aware expert merging (CAEM-MoE, AACL 2025, Algorithm 1 and appendix A.2), as functions on named tensors.

`normalized_entropy` measures how evenly a model's experts are used, `allocate_experts` shares out the experts of one
layer by that, `merge` makes the merged model (`merge_lazily` a tensor at a time), `fill` puts it into a model object.
Nothing of transformers is imported here.
"""

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import nn


class _HasExperts(Protocol):
    """What a configuration must have for `merged_config`."""

    num_experts: int
    tie_word_embeddings: bool
    separate_embeddings: bool


Config = TypeVar("Config", bound=_HasExperts)

_STACKS = ("encoder", "decoder")
_READINGS = ("paper", "released")
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_HEAD = "lm_head.weight"
_EXPERT = re.compile(r"((encoder|decoder)\.block\.(\d+)\.layer\.\d+\.mlp)\.experts\.expert_(\d+)\.(.+)")
_ROUTER = re.compile(r"((encoder|decoder)\.block\.(\d+)\.layer\.\d+\.mlp)\.router\.classifier\.(weight|bias)")


def normalized_entropy(counts: torch.Tensor) -> torch.Tensor:
    """
    Entropy of expert usage over that of even usage: H = -sum_j p_j log p_j / log n, with 0 log 0 = 0.

    Args:
        counts: tokens sent to each expert, non-negative, [..., n].

    Returns:
        float64 [...], in [0, 1]. A row of zeros has entropy 0: it tells of no complexity. So has a single expert.

    Raises:
        ValueError: a negative or non-finite count.
    """
    counts = torch.as_tensor(counts).double()
    if not bool(((counts >= 0) & counts.isfinite()).all()):
        raise ValueError("normalized_entropy: counts must be finite and not negative")
    n = counts.shape[-1]
    if n < 2:
        return torch.zeros(counts.shape[:-1], dtype=torch.float64, device=counts.device)
    share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return (torch.special.entr(share).sum(dim=-1) / math.log(n)).clamp(0.0, 1.0)


def allocate_experts(
    entropies: Sequence[float],
    source_experts: int | Sequence[int],
    target_experts: int,
    alpha: float = 1.0,
    reading: str = "paper",
) -> list[int]:
    """
    How many experts each source gives to one layer of the merged model (paper, appendix A.2).

    The ideal share of source i is q_i = target_experts * H_i / sum_k H_k (even if all entropies are 0), blended with an
    even one: alpha * q_i + (1 - alpha) * target_experts / M. It is rounded down, then brought within 1 and n_i.
    Experts too many are taken one by one from the source that has most, of several from the one of the smallest
    remainder. Experts that are left go to the sources with room, one each in turn, larger remainder first, until none
    is left; this is the paper's rule for one, two and three sources with room, and goes on likewise for more. Ties go
    to the lower index. Shares are rounded to nine decimals first, so that 2.9999999999 counts as 3.

    An alpha under 0.01 is taken as 0.01, as in the authors' code: at alpha 0 (CAEM-Avg) the entropy decides only who
    gets the odd experts.

    Args:
        entropies: of each source's usage of this layer, M >= 2 non-negative numbers.
        source_experts: experts a layer n_i of each source, or one number for all.
        target_experts: experts of the merged layer, from M to the sum of n_i.
        alpha: 1 shares by entropy, 0 evenly.
        reading: `"paper"`, remainder q_i - floor(q_i); `"released"`, as in the authors' code: the remainder is what is
            above the bounded number (negative for a source raised to 1), and an expert too many is taken from the first
            source (of more than one expert) with the remainder found, whether or not it has most.

    Returns:
        M numbers a_i with 1 <= a_i <= n_i and sum target_experts.

    Raises:
        ValueError: any argument out of these ranges.
    """
    entropies = [float(entropy) for entropy in entropies]
    num_sources = len(entropies)
    limits = [source_experts] * num_sources if isinstance(source_experts, int) else [int(n) for n in source_experts]
    _check_range(limits, target_experts, num_sources)
    if any(not math.isfinite(entropy) or entropy < 0 for entropy in entropies):
        raise ValueError(f"allocate_experts: entropies must be finite and not negative, not {entropies}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"allocate_experts: alpha must be between 0 and 1, not {alpha}")
    if reading not in _READINGS:
        raise ValueError(f'allocate_experts: reading must be "paper" or "released", not {reading!r}')

    alpha = max(alpha, 0.01)
    total = sum(entropies)
    even = target_experts / num_sources
    ideal = [target_experts * entropy / total if total > 0 else even for entropy in entropies]
    ideal = [round(alpha * share + (1 - alpha) * even, 9) for share in ideal]
    given = [min(max(math.floor(share), 1), limit) for share, limit in zip(ideal, limits, strict=True)]
    lower = given if reading == "released" else [math.floor(share) for share in ideal]
    remainder = [round(share - whole, 9) for share, whole in zip(ideal, lower, strict=True)]

    while sum(given) > target_experts:
        most = max(given)
        smallest = min(remainder[i] for i in range(num_sources) if given[i] == most)
        giver = next(
            i
            for i in range(num_sources)
            if remainder[i] == smallest and (given[i] > 1 if reading == "released" else given[i] == most)
        )
        given[giver] -= 1

    in_turn = sorted(range(num_sources), key=lambda i: -remainder[i])
    while sum(given) < target_experts:
        for taker in in_turn:
            if given[taker] < limits[taker] and sum(given) < target_experts:
                given[taker] += 1
    return given


def _check_range(limits: Sequence[int], target_experts: int, num_sources: int) -> None:
    if num_sources < 2:
        raise ValueError(f"merging needs at least 2 sources, not {num_sources}")
    if len(limits) != num_sources or min(limits) < 1:
        raise ValueError(f"source_experts must be {num_sources} positive numbers, not {list(limits)}")
    if not num_sources <= target_experts <= sum(limits):
        raise ValueError(
            f"target_experts is {target_experts}; with {num_sources} sources of {list(limits)} experts it must be from "
            f"{num_sources} (one of each) to {sum(limits)} (all)"
        )


def merge(
    sources: Sequence[Mapping[str, torch.Tensor]],
    usage: Sequence[Mapping[str, torch.Tensor]],
    target_experts: int,
    alpha: float = 1.0,
    reading: str = "paper",
    projection: str | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Merge fine-tuned copies of one Switch Transformer into one model (paper, Algorithm 1).

    In each sparse layer the entropies of the sources' usage share out the experts (`allocate_experts`); of each source
    the most used come over (of equally used the lower index), with their rows of the router's classifier, sources in
    order and experts in order of usage. Every other tensor of a stack is the average with the weights
    w_i = N_i / sum_k N_k, where N_i are the experts that source i gave to that stack. The embedding belongs to both
    stacks: its weights are the means of theirs. A tied output projection stays tied; an untied one is averaged with
    the decoder.

    Args:
        sources: state dicts under Hugging Face's names, or mappings that read from disk. Each tensor is asked for once,
            and one or two are held at a time beside the result. They are neither changed nor aliased.
        usage: of each source, `{"encoder": counts [sparse layers, experts], "decoder": ...}`, as `expert_usage` gives.
        target_experts: experts a sparse layer of the result, from M to all that the sources have.
        alpha: see `allocate_experts`.
        reading: `"paper"`, or `"released"` for what the authors' code leaves: the encoder's and the decoder's embedding
            are averages with their stack's weights, and the output projection is the *sum* of the two, so that the
            initial logits double. Tied sources only; the result needs `merged_config`.
        projection: another reading for embedding and output projection than for the allocation; None takes `reading`.

    Returns:
        The state dict, under the names of the first source (names tied to one another hold one tensor), in the sources'
        dtype; and a record of plain Python values: `target_experts`, `alpha`, `reading`, `projection`,
        `tie_word_embeddings`, `separate_embeddings`, and for each stack `entropies` [M][layers], `allocation`
        [layers][M], `experts` [layers][M] lists of indices in order of usage, `weights` [M].

    Raises:
        ValueError: fewer than two sources; names, sparse layers or shapes that differ; usage missing, of another shape
            or of no token; an argument that `allocate_experts` refuses.
    """
    record, tensors = merge_lazily(sources, usage, target_experts, alpha, reading, projection)
    return dict(tensors), record


def merge_lazily(
    sources: Sequence[Mapping[str, torch.Tensor]],
    usage: Sequence[Mapping[str, torch.Tensor]],
    target_experts: int,
    alpha: float = 1.0,
    reading: str = "paper",
    projection: str | None = None,
    shares: Sequence[Mapping[str, Sequence[float]]] | None = None,
) -> tuple[dict[str, Any], Iterator[tuple[str, torch.Tensor]]]:
    """
    As `merge`, but the result's tensors come one after another, each made when it is asked for: nothing is kept of those
    before. Names tied to one another come in a row, with the same tensor. Experts that were not chosen are never read.

    Args:
        shares: of each source, `{"encoder": a number for each sparse layer, "decoder": ...}`, by which experts are shared out
            in place of the entropies.

    Returns:
        The record, in which `tie_word_embeddings` and `separate_embeddings` stand when the last tensor has come; and an
        iterator over (name, tensor). What shapes it finds not to fit, it says on the way.
    """
    layouts = [_Layout(source, i) for i, source in enumerate(sources)]
    limits = [layout.num_experts for layout in layouts]
    _check_range(limits, target_experts, len(layouts))
    for i, layout in enumerate(layouts[1:], start=1):
        differing = sorted(layout.skeleton ^ layouts[0].skeleton)
        if differing:
            raise ValueError(f"sources 0 and {i} are not of one shape: only one of them has {differing[0]}")
    counts = {stack: _checked_usage(usage, stack, layouts) for stack in _STACKS}

    projection = reading if projection is None else projection
    if not {reading, projection} <= set(_READINGS):
        raise ValueError(
            f'merge: reading and projection must be "paper" or "released", not {reading!r}, {projection!r}'
        )
    record: dict[str, Any] = {
        "target_experts": target_experts,
        "alpha": alpha,
        "reading": reading,
        "projection": projection,
    }
    for stack in _STACKS:
        by = None if shares is None else [share[stack] for share in shares]
        record[stack] = share_out(counts[stack], limits, target_experts, alpha, reading, by)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for stack in _STACKS:
            for prefix, chosen in zip(layouts[0].sparse[stack], record[stack]["experts"], strict=True):
                yield from _merge_sparse_layer(sources, layouts, prefix, chosen)
            for name in layouts[0].dense[stack]:
                average = Average(name)
                for source, weight in zip(sources, record[stack]["weights"], strict=True):
                    average.add(source[name], weight)
                yield name, average.result()
        yield from _merge_embeddings(sources, layouts, record).items()

    return record, tensors()


def share_out(
    counts: Sequence[torch.Tensor],
    limits: int | Sequence[int],
    target_experts: int,
    alpha: float = 1.0,
    reading: str = "paper",
    by: Sequence[Sequence[float]] | None = None,
) -> dict[str, Any]:
    """
    Which experts of each source a stack gets, and the weights of its other tensors (paper, Algorithm 1).

    Args:
        counts: tokens of each expert, [sparse layers, experts], of each source.
        limits, target_experts, alpha, reading: see `allocate_experts`.
        by: [layers] of each source, what experts are shared out by in place of the entropies.

    Returns:
        `entropies` [M][layers], `allocation` [layers][M], `experts` [layers][M] lists of indices in order of usage (of equally
        used the lower index first), `weights` [M]: w_i = N_i / sum_k N_k; equal ones in a stack without a sparse layer.

    Raises:
        ValueError: an argument that `allocate_experts` refuses.
    """
    entropies = [normalized_entropy(count) for count in counts]
    by = entropies if by is None else by
    allocation = [
        allocate_experts([float(h[l]) for h in by], limits, target_experts, alpha, reading)
        for l in range(len(counts[0]))
    ]
    by_use = [count.argsort(dim=-1, descending=True, stable=True) for count in counts]
    given = [sum(layer[i] for layer in allocation) for i in range(len(counts))] if allocation else [1] * len(counts)
    return {
        "entropies": [h.tolist() for h in entropies],
        "allocation": allocation,
        "experts": [[by_use[i][l, :a].tolist() for i, a in enumerate(layer)] for l, layer in enumerate(allocation)],
        "weights": [number / sum(given) for number in given],
    }


class _Layout:
    """What the names of a source say: its sparse layers, experts and other tensors."""

    def __init__(self, source: Mapping[str, torch.Tensor], index: int):
        names = list(source.keys())
        self.embeddings = [name for name in _EMBEDDINGS if name in names]
        self.has_head = _HEAD in names
        self.dense: dict[str, list[str]] = {stack: [] for stack in _STACKS}
        self.routers: dict[str, list[str]] = {}
        experts: dict[str, dict[str, set[int]]] = {}  # layer -> part of an expert -> numbers
        blocks: dict[str, tuple[str, int]] = {}  # layer -> its stack and block
        for name in names:
            stack = name.split(".")[0]
            if name in self.embeddings or name == _HEAD:
                continue
            if match := _EXPERT.fullmatch(name):
                experts.setdefault(match[1], {}).setdefault(match[5], set()).add(int(match[4]))
            elif match := _ROUTER.fullmatch(name):
                self.routers.setdefault(match[1], []).append(match[4])
                blocks[match[1]] = (match[2], int(match[3]))
            elif stack in _STACKS:
                self.dense[stack].append(name)
            else:
                raise ValueError(f"source {index} has {name}, which no Switch Transformer has")
        if not self.embeddings:
            raise ValueError(f"source {index} has no {_EMBEDDINGS[0]}")
        if not experts or experts.keys() != blocks.keys():
            odd = sorted(experts.keys() ^ blocks.keys()) or ["any layer"]
            raise ValueError(f"source {index} does not have both experts and a router in {odd[0]}")

        numbers = {(prefix, part): found for prefix, parts in experts.items() for part, found in parts.items()}
        self.num_experts = max(len(found) for found in numbers.values())
        for (prefix, part), found in numbers.items():
            missing = sorted(set(range(self.num_experts)) - found)
            if missing:
                raise ValueError(f"source {index} has no {prefix}.experts.expert_{missing[0]}.{part}")
        self.expert_parts = {prefix: list(parts) for prefix, parts in experts.items()}
        ordered = sorted(blocks, key=lambda prefix: blocks[prefix])
        self.sparse = {stack: [prefix for prefix in ordered if blocks[prefix][0] == stack] for stack in _STACKS}
        # What must be the same in all sources, whatever their number of experts.
        self.skeleton = {name for stack in _STACKS for name in self.dense[stack]}
        self.skeleton |= {f"{prefix}.experts.expert_0.{part}" for prefix, part in numbers}
        self.skeleton |= {f"{prefix}.router.classifier.{kind}" for prefix in blocks for kind in self.routers[prefix]}


def _checked_usage(
    usage: Sequence[Mapping[str, torch.Tensor]], stack: str, layouts: Sequence[_Layout]
) -> list[torch.Tensor]:
    """Counts of each source for this stack, float64 [sparse layers, experts] on the CPU."""
    if len(usage) != len(layouts):
        raise ValueError(f"usage is of {len(usage)} sources, there are {len(layouts)}")
    checked = []
    for i, (one, layout) in enumerate(zip(usage, layouts, strict=True)):
        if stack not in one:
            raise ValueError(f"the usage of source {i} lacks the {stack}")
        count = torch.as_tensor(one[stack]).detach().cpu().double()
        wanted = (len(layout.sparse[stack]), layout.num_experts)
        if tuple(count.shape) != wanted and not (wanted[0] == 0 == count.numel()):
            raise ValueError(f"the {stack} usage of source {i} is {tuple(count.shape)}, its layers want {wanted}")
        if wanted[0] and not count.sum() > 0:
            raise ValueError(f"the {stack} usage of source {i} is all zero: count it on validation data before merging")
        checked.append(count.reshape(wanted))
    return checked


def _merge_sparse_layer(
    sources: Sequence[Mapping[str, torch.Tensor]],
    layouts: Sequence[_Layout],
    prefix: str,
    chosen: Sequence[Sequence[int]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The chosen experts of every source and their rows of the classifier, in the target's order."""
    for kind in layouts[0].routers[prefix]:
        name = f"{prefix}.router.classifier.{kind}"
        rows: list[torch.Tensor] = []
        for i, experts in enumerate(chosen):
            tensor = sources[i][name].detach()
            if tensor.shape[0] != layouts[i].num_experts or rows and tensor.shape[1:] != rows[0].shape[1:]:
                raise ValueError(f"{name} of source {i} is {tuple(tensor.shape)}, which does not fit the others")
            taken = tensor[torch.tensor(experts, device=tensor.device)]
            rows.append(taken.to(rows[0].device) if rows else taken)
        yield name, torch.cat(rows)
    for part in layouts[0].expert_parts[prefix]:
        slots = [(i, expert) for i, experts in enumerate(chosen) for expert in experts]
        shape = None
        for slot, (i, expert) in enumerate(slots):
            name = f"{prefix}.experts.expert_{expert}.{part}"
            tensor = sources[i][name].detach()
            shape = tensor.shape if shape is None else shape
            if tensor.shape != shape:
                raise ValueError(f"{name} of source {i} is {tuple(tensor.shape)}, not {tuple(shape)}")
            yield f"{prefix}.experts.expert_{slot}.{part}", tensor.clone(memory_format=torch.contiguous_format)


class Average:
    """Weighted sum of the tensors of one name, which come one at a time; at least in float32, `result` in their dtype.

    Raises ValueError where shapes differ.
    """

    def __init__(self, name: str):
        self.name = name
        self.total: torch.Tensor | None = None  # until the first comes
        self.dtype: torch.dtype | None = None

    def add(self, tensor: torch.Tensor, weight: float) -> None:
        if self.total is None:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            self.dtype, self.total = tensor.dtype, torch.zeros(tensor.shape, dtype=wide, device=tensor.device)
        if tensor.shape != self.total.shape:
            shapes = f"{tuple(self.total.shape)} in one model and {tuple(tensor.shape)} in another"
            raise ValueError(f"{self.name} is {shapes}")
        self.total.add_(tensor.detach().to(device=self.total.device, dtype=self.total.dtype), alpha=weight)

    def result(self) -> torch.Tensor:
        assert self.total is not None
        return self.total.to(self.dtype)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _merge_embeddings(
    sources: Sequence[Mapping[str, torch.Tensor]], layouts: Sequence[_Layout], record: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Embedding and output projection; notes in the record how the result is tied."""
    weights = {stack: record[stack]["weights"] for stack in _STACKS}
    average = {stack: Average(_EMBEDDINGS[0]) for stack in _STACKS}  # the embedding, by each stack's weights
    head, tied = Average(_HEAD), []
    for i, (source, layout) in enumerate(zip(sources, layouts, strict=True)):
        embedding = source[layout.embeddings[0]]
        for name in layout.embeddings[1:]:
            if not _same(source[name], embedding):
                raise ValueError(f"source {i} has a {name} of its own; only sources with one embedding can be merged")
        for stack in _STACKS:
            average[stack].add(embedding, weights[stack][i])
        projection = source[_HEAD] if layout.has_head else embedding
        tied.append(_same(projection, embedding))
        if not tied[i]:
            head.add(projection, weights["decoder"][i])
    if len(set(tied)) > 1:
        raise ValueError(f"{_HEAD} is tied to the embedding in source {tied.index(True)}, not in {tied.index(False)}")

    released = record["projection"] == "released"
    if released and not tied[0]:
        raise ValueError(f"the released reading is for sources whose {_HEAD} is tied to the embedding")
    record["tie_word_embeddings"] = tied[0] and not released
    record["separate_embeddings"] = released

    of_encoder, of_decoder = average["encoder"].total, average["decoder"].total
    assert of_encoder is not None and of_decoder is not None
    total = of_encoder + of_decoder
    mean = (total / 2).to(average["encoder"].dtype)
    if released:
        separate = dict(zip(_EMBEDDINGS, (mean, average["encoder"].result(), average["decoder"].result()), strict=True))
        return {**separate, _HEAD: total.to(mean.dtype)}
    state = {name: mean for name in layouts[0].embeddings}
    if layouts[0].has_head:
        state[_HEAD] = mean if tied[0] else head.result()
    return state


def merged_config(config: Config, target_experts: int, reading: str = "paper") -> Config:
    """A `SwitchTransformersConfig` of a model merged from sources of this one; the argument is left as it is."""
    config = copy.deepcopy(config)
    config.num_experts = target_experts
    if reading == "released":
        config.tie_word_embeddings = False
        config.separate_embeddings = True
    return config


def fill(models, target, en_num_experts, de_num_experts, num_layers, alpha=1.0, reading="paper"):
    """
    Fill a model with the merge of others: `SwitchTransformersForConditionalGeneration.caem`.

    Args:
        models: the fine-tuned sources (Switch models, or modules that hold one as `STmodel`), whose routers have
            counted usage on validation data (`set_usage_counting`, then forward or generate).
        target: a model of the sources' shape with the target's number of experts.
        en_num_experts, de_num_experts: experts of the target's sparse layers; both the target's `num_experts`.
        num_layers: blocks of a stack, as a check.
        alpha, reading: see `merge`. "released" unties the target's embeddings.

    Returns:
        As the authors' code: `target`, and the experts that each source gave to each sparse layer of the encoder and of
        the decoder, both [layers][M].

    Raises:
        ValueError: numbers that do not fit the target, and all that `merge` refuses.

    Warns of each sparse layer that no token reached: its entropy counts as 0.
    """
    models = [getattr(model, "STmodel", model) for model in models]
    config = target.config
    if not en_num_experts == de_num_experts == config.num_experts:
        raise ValueError(
            f"caem: en_num_experts {en_num_experts} and de_num_experts {de_num_experts} must both be the target's "
            f"num_experts, {config.num_experts}"
        )
    if num_layers not in (config.num_layers, config.num_decoder_layers):
        raise ValueError(f"caem: num_layers is {num_layers}, the target has {config.num_layers} blocks a stack")
    states, usage = [model.state_dict() for model in models], [model.expert_usage() for model in models]
    state, record = merge(states, usage, config.num_experts, alpha, reading)
    for i, counts in enumerate(usage):
        for stack in _STACKS:
            for layer, of_layer in enumerate(counts[stack], 1):
                if not of_layer.any():
                    said = f"caem: source {i}: no token reached {stack} sparse layer {layer}; its entropy counts as 0"
                    warnings.warn(said, stacklevel=3)

    if record["separate_embeddings"]:
        for part in (target, target.encoder, target.decoder):
            part.config = merged_config(part.config, part.config.num_experts, reading)
        for layer in (target.encoder.embed_tokens, target.decoder.embed_tokens, target.lm_head):
            layer.weight = nn.Parameter(layer.weight.detach().clone())
    target.load_state_dict(state)
    return target, record["encoder"]["allocation"], record["decoder"]["allocation"]
