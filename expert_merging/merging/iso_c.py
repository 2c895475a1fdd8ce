"""Iso-C (Marczak et al. 2025, arXiv 2502.04959): the sum of the task vectors with all its singular values made equal."""

import warnings
from collections.abc import Iterator, Sequence

import torch

from expert_merging.merging.matrices import by_matrix, svd
from expert_merging.merging.named import Tensors


def iso_c(
    base: Tensors, models: Sequence[Tensors], scale: float = 1.0, averaged: Sequence[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """theta_0 + scale * s U V^T for matrices, U diag(s_1, .., s_r) V^T the SVD of sum_i tau_i and s the mean of its r =
    min(m, k) singular values; theta_0 + scale * mean of the tau_i for all else.

    Args:
        averaged: parts of the names of matrices that are averaged, too.

    Where the sum has a lower rank q, its q directions get s, which stays the sum of the singular values over r, and no
    other direction is made up; a warning says in which tensors. Raises ValueError where the models do not fit together.
    """
    deficient: list[str] = []

    def isotropic(name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
        total = sum(tensors)
        u, s, v = svd(total)
        if 0 < len(s) < min(total.shape):
            deficient.append(f"{name} ({len(s)} of {min(total.shape)})")
        return s.sum() / min(total.shape) * u @ v.T

    def warning_last(merged: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        yield from merged
        if deficient:
            warnings.warn(
                f"Iso-C: {len(deficient)} sums of task vectors are of less than full rank, the first {deficient[0]}; "
                "directions that they lack are not filled in",
                stacklevel=2,
            )

    return warning_last(by_matrix(base, models, scale, averaged, isotropic))
