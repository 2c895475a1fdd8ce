"""The two orders of one sum over linear experts: mix their outputs (vanilla MoE), or their weights and then apply once (MEO).

sum_i g_i (W_i x + b_i) = (sum_i g_i W_i) x + sum_i g_i b_i (MEO, section 3). The first costs 2 k S P operations for S
tokens and matrices of P numbers, the second 2 S P + 2 k P.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from expert_merging.meo.gate import Routing, without_autocast

# Bytes of experts and merged weights in work at a time: on a CPU what stays in its cache, else what is little memory.
TILE_BYTES = {"cpu": 32 << 20}
OTHER_TILE_BYTES = 512 << 20
# Experts for one that is active, from which on each row's own are gathered: copying one takes as long as some nine
# multiplications a number (on a CPU; n = 8, 16 and 32, k = 2, 2 to 32 rows).
GATHER_ABOVE = 8


def merge(stack: Tensor, gates: Tensor) -> Tensor:
    """Weighted sums of experts: stack [n, ...], gates [R, n] -> [R, ...], in the stack's dtype."""
    return (gates.to(stack.dtype) @ stack.flatten(1)).view(len(gates), *stack.shape[1:])


def mix_outputs(x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """Vanilla MoE: every row of x goes through its k experts.

    Args:
        x: [R, ..., d_in]; weight: [n, d_out, d_in]; bias: [n, d_out]; routing: of R rows.
    Returns: [R, ..., d_out].
    """
    n, k = len(weight), routing.experts.shape[1]
    weights, biases = weight.unbind(0), bias.unbind(0) if bias is not None else [None] * n
    parts: Iterable[tuple[int, Tensor, Tensor]]  # expert, its rows, their shares
    if x.is_meta:  # for counting: which experts are chosen is not known and does not matter
        parts = [(j, torch.arange(len(x), device="meta"), routing.weights[:, j]) for j in range(k)]
    else:
        flat = routing.experts.flatten()
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=n).tolist()
        parts = zip(range(n), (order // k).split(counts), routing.weights.flatten()[order].split(counts), strict=True)
    y = None
    for expert, rows, share in parts:
        if len(rows):
            part = F.linear(x[rows], weights[expert], biases[expert])
            part = part * share.to(part.dtype).view(-1, *[1] * (x.dim() - 1))
            y = part.new_zeros(*x.shape[:-1], part.shape[-1]) if y is None else y
            y.index_add_(0, rows, part)
    return y


def mix_weights(x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """MEO: each sequence goes once through its own merged expert.

    Args:
        x: [R, S, d_in]; weight: [n, d_out, d_in]; bias: [n, d_out]; routing: of R rows.
    Returns: [R, S, d_out].
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    n, k = len(weight), routing.experts.shape[1]
    # Few of many experts: gather the rows' own k. Else one product with all n, which reads each only once for all rows.
    gathered = routing.experts if GATHER_ABOVE * k < n or len(x) == 1 and k < n else None
    with without_autocast(x):
        y = _MergedLinear.apply(x, weight, routing.gates, gathered)
        if bias is not None:
            y += merge(bias, routing.gates)[:, None].to(y.dtype)
    return y


class _MergedLinear(torch.autograd.Function):
    """y = x (sum_i g_i W_i)^T, a few output rows at a time, so that no more than a tile of merged weights exists.

    The backward pass merges again, which is cheap, instead of keeping R matrices a layer.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, gates: Tensor, gathered: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, gates, gathered)
        tiles = _tiles(weight, gates, gathered)
        if len(tiles) == 1:
            return torch.bmm(x, _merged(weight, gates, gathered, x.dtype).mT)
        y = x.new_empty(*x.shape[:2], weight.shape[1])
        for rows in tiles:
            y[..., rows] = torch.bmm(x, _merged(weight[:, rows], gates, gathered, x.dtype).mT)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, gates, gathered = ctx.saved_tensors
        for_x, for_weight, for_gates, _ = ctx.needs_input_grad
        dx = torch.zeros_like(x) if for_x else None
        dweight = torch.empty_like(weight) if for_weight else None
        dgates = torch.zeros_like(gates) if for_gates else None
        shares = gates.to(weight.dtype)
        with without_autocast(x):
            for rows in _tiles(weight, gates, gathered):
                part, dpart = weight[:, rows], dy[..., rows].to(x.dtype)
                if dx is not None:
                    dx.baddbmm_(dpart, _merged(part, gates, gathered, x.dtype))
                if dweight is not None or dgates is not None:
                    dmerged = torch.bmm(dpart.mT, x).to(weight.dtype).view(len(x), -1)
                if dweight is not None:
                    # Straight to its place: a second pass over all experts would cost as much as this product.
                    torch.mm(shares.mT, dmerged, out=dweight[:, rows].flatten(1))
                if dgates is not None:
                    dgates += (part.flatten(1) @ dmerged.mT).mT.to(dgates.dtype)
        return dx, dweight, dgates, None


def _merged(weight: Tensor, gates: Tensor, gathered: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Merged weights [R, rows, d_in] of a tile [n, rows, d_in]."""
    if gathered is None:
        return merge(weight, gates).to(dtype)
    shares = gates.gather(1, gathered).to(weight.dtype)[:, None]
    return torch.bmm(shares, weight[gathered].flatten(2)).view(len(gates), *weight.shape[1:]).to(dtype)


def _tiles(weight: Tensor, gates: Tensor, gathered: Tensor | None) -> list[slice]:
    """Ranges of output rows whose experts and merged weights fit the tile's bytes."""
    n, d_out, d_in = weight.shape
    matrices = len(gates) * (1 + gathered.shape[1]) if gathered is not None else len(gates) + n
    room = TILE_BYTES.get(weight.device.type, OTHER_TILE_BYTES)
    rows = max(1, room // (matrices * d_in * weight.element_size()))
    rows = d_out if rows >= d_out else max(rows // 16 * 16, min(rows, 16))
    return [slice(start, min(start + rows, d_out)) for start in range(0, d_out, rows)]
