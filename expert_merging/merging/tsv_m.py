"""TSV-M (Gargiulo et al. 2025, arXiv 2412.00081): each task vector's first singular vectors, made orthogonal to the others'."""

from collections.abc import Iterator, Sequence

import torch

from expert_merging.merging.matrices import by_matrix, svd
from expert_merging.merging.named import Tensors


def tsv_m(
    base: Tensors, models: Sequence[Tensors], scale: float = 1.0, averaged: Sequence[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """theta_0 + scale * A' diag(s) B'^T for matrices [m, k]; theta_0 + scale * mean of the tau_i for all else.

    Of the SVD of each tau_i the floor(min(m, k) / T) largest singular values and their vectors are kept, side by side in
    A [m, q], s [q] and B [k, q]; A' and B' are the nearest matrices with orthonormal columns. A matrix with fewer rows or
    columns than there are models stays theta_0's.

    Args:
        averaged: parts of the names of matrices that are averaged, too.

    Raises ValueError where the models do not fit together.
    """

    def merged(name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
        keep = min(tensors[0].shape) // len(tensors)
        parts = [svd(tensor) for tensor in tensors]
        left, right = (torch.cat([part[side][:, :keep] for part in parts], dim=1) for side in (0, 2))
        values = torch.cat([s[:keep] for _, s, _ in parts])
        return _orthonormal(left) * values @ _orthonormal(right).T

    return by_matrix(base, models, scale, averaged, merged)


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns: U V^T of the SVD U diag(s) V^T (orthogonal Procrustes)."""
    u, _, v = svd(matrix)
    return u @ v.T
