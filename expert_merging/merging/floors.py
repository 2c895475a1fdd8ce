"""Choices of experts without a method of their own: what any rule for choosing them has to beat."""

import torch

from expert_merging.merging.pooled import Observed, Pool, highest


def most_used(pool: Pool, observed: Observed, target: int, layer: int) -> tuple[Pool, list[list[int]]]:
    """The `target` experts that most tokens were sent to. Arguments and result as of `pooled.Bring`."""
    kept = highest(observed.frequency, target)
    return pool.kept(kept), [[e] for e in kept]


def at_random(pool: Pool, observed: Observed, target: int, layer: int, seed: int) -> tuple[Pool, list[list[int]]]:
    """`target` experts drawn without replacement, by the seed and the layer. Other arguments as of `pooled.Bring`."""
    generator = torch.Generator().manual_seed(1000 * seed + layer)
    kept = sorted(torch.randperm(len(pool.rows), generator=generator)[:target].tolist())
    return pool.kept(kept), [[e] for e in kept]
