"""Task arithmetic (Ilharco et al. 2023, section 2): base + scale * sum of task vectors."""

from collections.abc import Iterator, Sequence

import torch

from expert_merging.merging.named import Tensors, added, task_vectors


def task_arithmetic(base: Tensors, models: Sequence[Tensors], scale: float = 0.3) -> Iterator[tuple[str, torch.Tensor]]:
    """theta_0 + scale * sum_i (theta_i - theta_0). With scale 1/T the plain average of T models.

    Raises ValueError where the models do not fit together.
    """
    vectors = task_vectors(base, models)
    return added(base, lambda name: scale * sum(vector[name] for vector in vectors))
