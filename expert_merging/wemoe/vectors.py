"""Task vectors of one tensor, theta_i - theta_0 for i = 1..T, dense or sparse, and magnitude pruning.

Both classes hold T tensors of one shape, seen as matrices [out, in] (a bias is [out, 1]), and give them back a few rows at
a time, so that no more than that is ever dense.
"""

from collections.abc import Sequence

import torch
from torch import nn

BLOCK_BYTES = 1 << 20  # of one task's rows that are made dense together


def prune_magnitude(tensor: torch.Tensor, ratio: float, compat: str = "") -> torch.Tensor:
    """A copy of `tensor` with all but the largest magnitudes set to zero.

    Keeps exactly n - round(ratio n) of n elements, of equal ones those with the lowest index: ratio 0 keeps all, 1 none,
    and what a larger ratio keeps is a subset of what a smaller one keeps.

    Args:
        compat: "reference" keeps what is strictly above the quantile, as the released code of E-WEMoE does (arXiv
            2410.21804): ratio 0 then drops the smallest element, and a tensor of equal magnitudes is dropped whole.

    Raises ValueError for a ratio outside [0, 1] and an unknown `compat`.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"the prune ratio is {ratio}; it must be between 0 and 1")
    size = tensor.abs().flatten()
    if compat == "reference":
        return tensor * (tensor.abs() > size.float().quantile(ratio))
    if compat:
        raise ValueError(f"compat is {compat!r}; it must be empty or reference")
    keep = size.numel() - round(ratio * size.numel())
    if keep == 0:
        return torch.zeros_like(tensor)
    smallest = size.kthvalue(size.numel() - keep + 1).values
    kept = size > smallest
    equal = (size == smallest).nonzero().flatten()
    kept[equal[: keep - int(kept.sum())]] = True
    return torch.where(kept.view_as(tensor), tensor, 0)


class DenseVectors(nn.Module):
    """T tensors of one shape, as they are."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        super().__init__()
        self.shape, self.block = tensors[0].shape, 1
        self.register_buffer("values", torch.stack([tensor.detach().flatten() for tensor in tensors]))

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of all T matrices, [T, (stop - start) in]."""
        width = self.values.shape[1] // self.shape[0]
        return self.values[:, start * width : stop * width]

    def nonzeros(self) -> list[int]:
        """Elements that are held, of each task."""
        return [self.values.shape[1]] * len(self)


class SparseVectors(nn.Module):
    """T tensors of one shape, most elements of which are zero: values, and an int32 each that says where.

    The places count through [block of rows, task, row in the block, column], so that a block of all tasks is one slice.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]):
        super().__init__()
        self.shape, self.tasks = tensors[0].shape, len(tensors)
        out, width = self.shape[0], tensors[0].numel() // self.shape[0]
        self.block = min(out, max(1, BLOCK_BYTES // (4 * width)))
        stacked = torch.stack([tensor.detach().reshape(out, width) for tensor in tensors])
        values, places, self._bounds = [], [], [0]
        for number, rows in enumerate(stacked.split(self.block, dim=1)):
            flat = rows.flatten()
            at = flat.nonzero().flatten()
            values.append(flat[at])
            places.append(at + number * self._block_size())
            self._bounds.append(self._bounds[-1] + len(at))
        kind = torch.int32 if len(self._bounds) * self._block_size() < 2**31 else torch.int64
        self.register_buffer("values", torch.cat(values))
        self.register_buffer("places", torch.cat(places).to(kind))

    def __len__(self) -> int:
        return self.tasks

    def _block_size(self) -> int:
        return self.tasks * self.block * (self.shape.numel() // self.shape[0])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of all T matrices, dense, [T, (stop - start) in]; `start` is a multiple of `block`."""
        first, last = start // self.block, -(-stop // self.block)
        width, size = self.shape.numel() // self.shape[0], self._block_size()
        here = slice(self._bounds[first], self._bounds[last])
        full = self.values.new_zeros((last - first) * size)
        full.index_copy_(0, self.places[here].long() - first * size, self.values[here])
        whole = self.block * width
        if last * self.block > self.shape[0]:  # the last block is shorter, and was numbered by its own length
            short = (self.shape[0] - (last - 1) * self.block) * width
            parts = [full[: (last - first - 1) * size].view(-1, self.tasks, whole).transpose(0, 1).flatten(1)]
            parts.append(full[(last - first - 1) * size :][: self.tasks * short].view(self.tasks, short))
            return torch.cat(parts, dim=1) if last - first > 1 else parts[1]
        return full.view(-1, self.tasks, whole).transpose(0, 1).reshape(self.tasks, -1)

    def nonzeros(self) -> list[int]:
        """Elements that are held, of each task."""
        counts = [0] * self.tasks
        for start in range(0, self.shape[0], self.block):
            dense = self.rows(start, min(start + self.block, self.shape[0]))
            counts = [a + b for a, b in zip(counts, dense.count_nonzero(dim=1).tolist(), strict=True)]
        return counts


def held_bytes(vectors: nn.Module) -> int:
    """Bytes of memory that the buffers of task vectors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in vectors.buffers())
