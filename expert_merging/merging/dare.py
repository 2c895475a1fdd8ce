"""DARE (Yu et al. 2024, section 3): drop entries of the task vectors at random and scale up the rest, then merge."""

from collections.abc import Callable, Iterator, Sequence

import torch

from expert_merging.merging.named import Computed, Tensors, added, task_vectors
from expert_merging.merging.ties import ties_of


def dare_task_arithmetic(
    base: Tensors, models: Sequence[Tensors], scale: float = 0.3, drop: float = 0.5, seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """theta_0 + scale * sum_i (dropped task vectors).

    Args:
        drop: probability with which an entry of a task vector is dropped; those that stay are divided by 1 - drop.

    Raises ValueError where the models do not fit together or `drop` is not in [0, 1).
    """
    vectors = dropped(base, task_vectors(base, models), drop, seed)
    return added(base, lambda name: scale * sum(vector[name] for vector in vectors))


def dare_ties(
    base: Tensors, models: Sequence[Tensors], scale: float = 0.3, drop: float = 0.5, seed: int = 0, keep: float = 0.2,
    merge: str = "mean",
) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """TIES of the dropped task vectors; arguments as of `dare_task_arithmetic` and `ties`."""
    return ties_of(base, dropped(base, task_vectors(base, models), drop, seed), scale, keep, merge)


def dropped(base: Tensors, vectors: Sequence[Computed], drop: float, seed: int) -> list[Computed]:
    """The task vectors after dropping. An entry loses or keeps its value at every access alike.

    One generator runs over all tensors of the first task, then of the second, as if all were in memory: the state in
    which it meets each of them is kept (5 kB a tensor), so that any tensor can be asked for at any time.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop is {drop}; it must be at least 0 and below 1")
    generator = torch.Generator().manual_seed(seed)
    states: dict[tuple[int, str], torch.Tensor] = {}
    for i in range(len(vectors)):
        for name in vectors[0]:
            states[i, name] = generator.get_state()
            torch.rand(base[name].shape, generator=generator)

    def of(i: int) -> Callable[[str], torch.Tensor]:
        def compute(name: str) -> torch.Tensor:
            vector = vectors[i][name]
            drawn = torch.rand(vector.shape, generator=torch.Generator().set_state(states[i, name]))
            return vector * (drawn > drop).to(vector.device) / (1 - drop)

        return compute

    return [Computed(list(vectors[0]), of(i)) for i in range(len(vectors))]
