"""Several models' experts in one pool, brought to fewer: what all such methods share.

A pool holds the experts of all sources, layer by layer: source 0's first, each in its order. A method makes of a layer's pool
as many experts as the target has, with their router rows; every other tensor is the plain average. Expert g is the function
y = wo relu(wi x), with wi [d_ff, d_model] and wo [d_model, d_ff].
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from expert_merging.merging.average import average_lazily
from expert_merging.merging.named import Computed, Tensors, wide

_EXPERT = re.compile(r"(.+)\.experts\.expert_(\d+)\.(wi|wo)\.weight")
_ROUTER = re.compile(r"(.+)\.router\.classifier\.weight")


@dataclass(frozen=True)
class Observed:
    """What inputs say of a layer's pool of P experts. Tokens are weighted so that each source's count alike.

    frequency: [P], the share of tokens that the source sent to the expert; adds up to 1.
    similarity: [P, P], cosines of the experts' router logits over all sources' tokens.
    outputs: [P, d_model], mean output on all sources' tokens.
    saliency: [P], mean of gate times norm of the output over the tokens that the source sent there; 0 where there is none.
    """

    frequency: torch.Tensor
    similarity: torch.Tensor
    outputs: torch.Tensor
    saliency: torch.Tensor


@dataclass(frozen=True)
class Pool:
    """The weights of a layer's pool, float32: wi [P, d_ff, d_model], wo [P, d_model, d_ff], rows [P, d_model]."""

    wi: torch.Tensor
    wo: torch.Tensor
    rows: torch.Tensor

    def kept(self, experts: Sequence[int]) -> "Pool":
        """Some of the experts, as they are."""
        return Pool(self.wi[list(experts)], self.wo[list(experts)], self.rows[list(experts)])


Bring = Callable[[Pool, Observed, int, int], tuple[Pool, list[list[int]]]]
"""(pool, what was observed, experts wanted, number of the layer) -> (as many experts, the members of the pool in each)."""


def layers_of(model: Tensors) -> list[str]:
    """The names of the sparse layers, as "encoder.block.1.layer.1.mlp"."""
    return [match[1] for name in model if (match := _ROUTER.fullmatch(name))]


def pool_of(models: Sequence[Tensors], layer: str) -> Pool:
    """The pool of a layer. Raises ValueError where an expert or the router is missing."""
    wi, wo, rows = [], [], []
    for i, model in enumerate(models):
        try:
            router = wide(model[f"{layer}.router.classifier.weight"])
            experts = [
                [wide(model[f"{layer}.experts.expert_{e}.{part}.weight"]) for part in ("wi", "wo")]
                for e in range(len(router))
            ]
        except KeyError as error:
            raise ValueError(f"model {i} has no {error.args[0]}") from error
        rows.append(router)
        wi += [one for one, _ in experts]
        wo += [one for _, one in experts]
    return Pool(torch.stack(wi), torch.stack(wo), torch.cat(rows))


def merge_pools(
    models: Sequence[Tensors], observed: Mapping[str, Observed], target: int, bring: Bring
) -> tuple[dict[str, list[list[int]]], Iterator[tuple[str, torch.Tensor]]]:
    """
    Bring every sparse layer's pool to `target` experts and average all else.

    Args:
        models: of each source, tensors under Hugging Face's names.
        observed: of each sparse layer, by its name.
        bring: the method.

    Returns:
        {layer: the pool's members in each new expert}, filled as the tensors are made; and (name, tensor) in the first
        source's dtypes.

    Raises:
        ValueError: no model, sources of different shapes, too few experts in a pool.
    """
    if not models:
        raise ValueError("there is no model to merge")
    members: dict[str, list[list[int]]] = {}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number, layer in enumerate(layers_of(models[0])):
            pool = pool_of(models, layer)
            if not 1 <= target <= len(pool.rows):
                raise ValueError(f"{layer}: {target} experts are wanted of a pool of {len(pool.rows)}")
            made, members[layer] = bring(pool, observed[layer], target, number)
            dtype = models[0][f"{layer}.router.classifier.weight"].dtype
            yield f"{layer}.router.classifier.weight", made.rows.to(dtype).contiguous()
            for e in range(target):
                for part, stacked in (("wi", made.wi), ("wo", made.wo)):
                    dtype = models[0][f"{layer}.experts.expert_0.{part}.weight"].dtype
                    yield f"{layer}.experts.expert_{e}.{part}.weight", stacked[e].to(dtype).contiguous()
        yield from average_lazily([_without_layers(model) for model in models])

    return members, tensors()


def merged_group(pool: Pool, group: Sequence[int], frequency: torch.Tensor) -> Pool:
    """The average of a group's experts and rows, weighted by frequency; plain where none of them was used."""
    of_group = frequency[list(group)].to(pool.wi.dtype)
    weights = of_group / (of_group.sum() + 1e-7) if of_group.sum() > 0 else torch.full_like(of_group, 1 / len(group))
    part = pool.kept(group)
    return Pool(*(torch.tensordot(weights, tensor, dims=1)[None] for tensor in (part.wi, part.wo, part.rows)))


def joined(pools: Sequence[Pool]) -> Pool:
    """Pools one after another."""
    return Pool(*(torch.cat([getattr(pool, name) for pool in pools]) for name in ("wi", "wo", "rows")))


def highest(values: torch.Tensor, number: int) -> list[int]:
    """The places of the `number` largest, of equal ones the first, in order of place."""
    return sorted(values.argsort(descending=True, stable=True)[:number].tolist())


def _without_layers(model: Tensors) -> Tensors:
    names = [name for name in model if not _EXPERT.fullmatch(name) and not _ROUTER.fullmatch(name)]
    return Computed(names, lambda name: model[name])
