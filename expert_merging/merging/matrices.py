"""What Iso-C and TSV-M share: task vectors that are matrices are merged by their singular vectors, all others averaged."""

from collections.abc import Callable, Iterator, Sequence

import torch

from expert_merging.merging.named import Tensors, added, task_vectors


def by_matrix(
    base: Tensors, models: Sequence[Tensors], scale: float, averaged: Sequence[str],
    merge: Callable[[str, list[torch.Tensor]], torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """theta_0 + scale * merge(name, [tau_1, .., tau_T]) for matrices, in float64; theta_0 + scale * mean of the tau_i for
    tensors of other dimensions, and for matrices in whose names one of `averaged` stands.

    Raises ValueError where the models do not fit together or a matrix is not finite.
    """
    vectors = task_vectors(base, models)

    def change(name: str) -> torch.Tensor:
        tensors = [vector[name] for vector in vectors]
        if tensors[0].dim() != 2 or any(part in name for part in averaged):
            return scale * (sum(tensors) / len(tensors))
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError(f"{name} has entries that are no finite numbers")
        return scale * merge(name, [tensor.double() for tensor in tensors]).to(tensors[0].dtype)

    return added(base, change)


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin (U [m, q], s [q], V [k, q]) of a matrix [m, k] of rank q.

    Directions of singular value 0 (below rounding, as numpy's `matrix_rank` has it) are left out: which vectors span them
    is the SVD routine's choice and no property of the matrix.
    """
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > s[:1] * max(matrix.shape) * torch.finfo(s.dtype).eps).sum())
    return u[:, :rank], s[:rank], vt[:rank].T
