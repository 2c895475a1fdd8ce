"""TIES (Yadav et al. 2023, section 4, algorithm 1): trim each task vector, elect a sign an entry, merge those that agree."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from expert_merging.merging.named import Computed, Tensors, added, task_vectors

_PIECE = 2**20  # entries that are counted at once: their digits take eight times the room of a float32


def ties(
    base: Tensors, models: Sequence[Tensors], scale: float = 0.3, keep: float = 0.2, merge: str = "mean"
) -> Iterator[tuple[str, torch.Tensor]]:
    """theta_0 + scale * (disjoint merge of the trimmed task vectors).

    Args:
        keep: share of each task vector, over the whole model, that is kept, the largest by magnitude.
        merge: "mean" of the entries that agree with the elected sign, as in the paper, or their "sum", as in much
            released code (fusion-bench's default among it).

    Raises ValueError where the models do not fit together, `keep` is not in (0, 1], or `merge` is another word.
    """
    return ties_of(base, task_vectors(base, models), scale, keep, merge)


def ties_of(
    base: Tensors, vectors: Sequence[Computed], scale: float, keep: float, merge: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `ties`, from task vectors; they are gone through four times and a fifth for the result."""
    if merge not in ("mean", "sum"):
        raise ValueError(f"merge is {merge!r}; it must be mean or sum")
    elected = elect(vectors, keep)

    def merged(name: str) -> torch.Tensor:
        agreeing = elected(name)
        number = (agreeing != 0).sum(dim=0, dtype=torch.int16).clamp_(min=1) if merge == "mean" else 1
        return scale * (agreeing.sum(dim=0) / number)

    return added(base, merged)


def elect(vectors: Sequence[Computed], keep: float) -> Callable[[str], torch.Tensor]:
    """name -> [tasks, ...]: the trimmed task vectors, zero where they are against the elected sign.

    The sign of an entry is that of the trimmed vectors' sum; where that is 0, the sign of most entries of the model.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; it must be above 0 and at most 1")
    thresholds = [_threshold(vector, keep) for vector in vectors]

    def trimmed(name: str) -> torch.Tensor:
        return torch.stack([_cut(vector[name], c) for vector, c in zip(vectors, thresholds, strict=True)])

    majority = sum(int(trimmed(name).sum(dim=0).sign().sum(dtype=torch.int64)) for name in vectors[0])

    def elected(name: str) -> torch.Tensor:
        found = trimmed(name)
        sign = found.sum(dim=0).sign()
        sign[sign == 0] = 1 if majority > 0 else -1
        return found.mul_(torch.where(sign > 0, found > 0, found < 0))

    return elected


def _cut(tensor: torch.Tensor, threshold: float) -> torch.Tensor:
    """The tensor, zero where its magnitude is below the threshold."""
    return tensor * (tensor.abs() >= threshold)


def elected_task_vectors(vectors: Sequence[Computed], keep: float) -> list[Computed]:
    """Each task vector trimmed and zero where it is against the elected sign (AdaMerging++, section 3.2)."""
    elected = elect(vectors, keep)

    def of(i: int) -> Callable[[str], torch.Tensor]:
        return lambda name: elected(name)[i]

    return [Computed(list(vectors[0]), of(i)) for i in range(len(vectors))]


def _threshold(vector: Computed, keep: float) -> float:
    """The magnitude from which on entries are kept: of d entries the (d - int(d keep))-th smallest."""
    size = sum(tensor.numel() for tensor in vector.values())
    smallest = size - int(size * keep)
    return kth_magnitude(vector.values(), smallest) if smallest > 0 else 0.0


def kth_magnitude(tensors: Iterable[torch.Tensor], k: int) -> float:
    """The k-th smallest |entry| (k from 1) of float32 or float64 tensors together, exactly, without holding them at once.

    Magnitudes are ordered as the integers with the same bits; their 16-bit digits are counted, the highest first.
    `tensors` is iterated once a digit.
    """
    prefix, left, digits = 0, k, None
    digit = 0
    while digits is None or digit < digits:
        counts = torch.zeros(65536, dtype=torch.int64)
        for tensor in tensors:
            kind = torch.int32 if tensor.dtype == torch.float32 else torch.int64
            digits = 2 if kind == torch.int32 else 4
            shift = 16 * (digits - 1 - digit)
            for piece in tensor.flatten().split(_PIECE):
                bits = piece.abs().view(kind).long()
                if digit:
                    bits = bits[bits >> (shift + 16) == prefix]
                counts += torch.bincount(bits >> shift & 0xFFFF, minlength=65536).cpu()
        upto = counts.cumsum(0)
        here = int(torch.searchsorted(upto, left))
        left -= int(upto[here - 1]) if here else 0
        prefix, digit = prefix << 16 | here, digit + 1
    integer, real = (torch.int32, torch.float32) if digits == 2 else (torch.int64, torch.float64)
    return torch.tensor(prefix, dtype=integer).view(real).item()
