"""Products with merged weights, W_b = W_0 + sum_t w_bt tau_t, and their gradients, a few rows of W at a time.

What is saved for the backward pass is the input and the weights w; merged rows are made again there.
"""

import torch
import torch.nn.functional as F
from torch import nn

MERGED_BYTES = {"cpu": 12 << 20, "cuda": 256 << 20}  # of merged rows, over all samples, that exist at a time
ONEDNN = torch.backends.mkldnn.is_available()
ONEDNN_FROM = 2**21  # multiplications, below which its calls are dearer
FEW_TOKENS = 4  # a sample with fewer tokens is cheaper by T + 1 products than by merging its weights


class EnsembledLinear(nn.Linear):
    """A linear layer that has task vectors; while `routing` [samples, T] is set, every sample has weights of its own.

    Made out of an existing layer by `ensemble`, which keeps its parameters; without `routing` it is an nn.Linear.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self.routing is None:
            return super().forward(states)
        rows = states.dim() == 2  # of a token each, as a mixture of experts hands them to an expert
        if states.dim() not in (2, 3) or len(states) != len(self.routing):
            raise LostSamples(f"a linear layer got {tuple(states.shape)} for {len(self.routing)} samples")
        made = _Product.apply(
            states.unsqueeze(1) if rows else states, self.routing, self.weight, self.deltas["weight"], self.product
        )
        if self.bias is not None:
            routing = self.routing.to(self.bias.dtype)
            delta = self.deltas.get("bias")
            bias = self.bias if delta is None else self.bias + routing @ delta.rows(0, len(self.bias))
            made = made + bias.to(made.dtype).view(-1, 1, made.shape[-1])
        return made.squeeze(1) if rows else made


class LostSamples(Exception):
    """A linear layer was given something else than [samples, tokens, in] or [samples, in]."""


def ensemble(layer: nn.Linear, deltas: dict[str, nn.Module]) -> None:
    """Make `layer` an EnsembledLinear in place. `deltas`: task vectors of "weight" and "bias"."""
    layer.plain, layer.deltas, layer.routing, layer.product = type(layer), deltas, None, None
    layer.__class__ = EnsembledLinear


def merged(base: torch.Tensor, weights: torch.Tensor, vectors: nn.Module) -> torch.Tensor:
    """base + sum_t weights[t] tau_t in the dtype of `base`, for weights [T]; differentiable in them."""
    return _Merge.apply(weights, base, vectors)


def _pieces(vectors: nn.Module, samples: int, device: torch.device, products: int = 0):
    """(start, stop) of rows that are merged together for so many samples; `products`: of a row's products, if not merged."""
    out = vectors.shape[0]
    row = (products or samples * (vectors.shape.numel() // out)) * vectors.values.element_size()
    rows = max(1, MERGED_BYTES["cpu" if device.type == "cpu" else "cuda"] // row)
    rows = max(vectors.block, rows // vectors.block * vectors.block)
    return [(start, min(start + rows, out)) for start in range(0, out, rows)]


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, base, vectors):
        ctx.vectors, ctx.dtype = vectors, weights.dtype
        made = torch.empty_like(base)
        flat, width = made.view(-1), base.numel() // base.shape[0]
        for start, stop in _pieces(vectors, 1, base.device):
            here = slice(start * width, stop * width)
            flat[here] = base.reshape(-1)[here] + weights.to(base.dtype) @ vectors.rows(start, stop).to(base.dtype)
        return made

    @staticmethod
    def backward(ctx, grad):
        vectors, grad = ctx.vectors, grad.reshape(-1)
        width = vectors.shape.numel() // vectors.shape[0]
        total = sum(
            vectors.rows(start, stop).to(grad.dtype) @ grad[start * width : stop * width]
            for start, stop in _pieces(vectors, 1, grad.device)
        )
        return total.to(ctx.dtype), None, None


class _Product(torch.autograd.Function):
    """states [S, N, in], routing [S, T], weight [out, in] -> states W_s^T, [S, N, out].

    By merging the weights of each sample, or by T + 1 products: W_s h = W_0 h + sum_t w_st (tau_t h).
    """

    @staticmethod
    def forward(ctx, states, routing, weight, vectors, product):
        product = states.shape[1] < FEW_TOKENS if product is None else product
        dtype = states.dtype
        routing_ = routing.to(dtype)
        out = states.new_empty((*states.shape[:2], len(weight)))
        products = routing.numel() * states.shape[1] if product else 0
        pieces = _pieces(vectors, len(states), states.device, products)
        size = 0 if product else len(states) * weight.shape[1] * (pieces[0][1] - pieces[0][0])
        room = states.new_empty(size)  # the same for all pieces: fresh memory costs as much as the merging
        for start, stop in pieces:
            tau = vectors.rows(start, stop).to(dtype)
            base = weight[start:stop].to(dtype)
            if product:
                out[..., start:stop] = F.linear(states, base) + _weighted(states, routing_, tau)
            else:
                own = _of_samples(base, routing_, tau, room)
                out[..., start:stop] = _by_sample(states, own)
        ctx.save_for_backward(states, routing, weight)
        ctx.vectors, ctx.product = vectors, product
        return out

    @staticmethod
    def backward(ctx, grad):
        states, routing, weight = ctx.saved_tensors
        vectors, dtype = ctx.vectors, states.dtype
        grad, routing_ = grad.to(dtype), routing.to(dtype)
        samples, tokens, width = states.shape
        to_states = torch.zeros_like(states) if ctx.needs_input_grad[0] else None
        to_routing = torch.zeros_like(routing, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        products = routing.numel() * tokens if ctx.product else 0
        for start, stop in _pieces(vectors, samples, states.device, products):
            tau = vectors.rows(start, stop).to(dtype)
            base, part = weight[start:stop].to(dtype), grad[..., start:stop]
            if ctx.product:
                if to_states is not None:
                    # [S, N, T, rows]: what each task vector's product is responsible for.
                    shares = routing_[:, None, :, None] * part[:, :, None, :]
                    to_states += part @ base + shares.flatten(2) @ tau.reshape(-1, width)
                if to_routing is not None:
                    made = F.linear(states, tau.reshape(-1, width)).view(samples, tokens, len(tau), -1)
                    to_routing += torch.einsum("snto,sno->st", made, part).float()
                continue
            if to_states is not None:
                to_states += torch.bmm(part, _of_samples(base, routing_, tau))
            if to_routing is not None:
                to_routing += (torch.bmm(part.transpose(1, 2), states).flatten(1) @ tau.t()).float()
        to_routing = None if to_routing is None else to_routing.to(routing.dtype)
        return to_states, to_routing, None, None, None


def _by_sample(states: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """states [S, N, in] times each sample's rows [S, rows, in]: [S, N, rows]."""
    large = states.shape[1] * own[0].numel() >= ONEDNN_FROM
    if large and ONEDNN and states.device.type == "cpu" and states.dtype == torch.float32:
        product = torch.ops.mkldnn._linear_pointwise  # torch's own way, MKL, leaves half of an AMD processor unused
        return torch.stack([product(a, b, None, "none", [], "") for a, b in zip(states.contiguous(), own, strict=True)])
    return torch.bmm(states, own.transpose(1, 2))


def _weighted(states: torch.Tensor, routing: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """sum_t w_st (tau_t h): [S, N, rows]."""
    made = F.linear(states, tau.reshape(-1, states.shape[-1])).unflatten(-1, (len(tau), -1))
    return torch.einsum("st,snto->sno", routing, made)


def _of_samples(
    base: torch.Tensor, routing: torch.Tensor, tau: torch.Tensor, room: torch.Tensor | None = None
) -> torch.Tensor:
    """Merged rows of each sample, [S, rows, in]; in `room`, if there is any."""
    out = None if room is None else room[: len(routing) * tau.shape[1]].view(len(routing), -1)
    return torch.addmm(base.reshape(1, -1), routing, tau, out=out).view(len(routing), *base.shape)
