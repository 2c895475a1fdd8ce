# Licensed under the Apache License, Version 2.0: see the LICENSE file, or http://www.apache.org/licenses/LICENSE-2.0
"""
Faster linear layers and attention for float32 on AMD's processors with AVX-512. Optional: without this file beside it the
model is slower there, and the same otherwise.

torch calls MKL, which leaves half of Zen 5's speed unused and a fifth of Zen 4's; oneDNN does not. With AVX2 alone oneDNN
is no faster, and half as fast where a matrix is transposed; on Intel's processors MKL is itself fast. The choice goes by
the processor's family, not by a measurement at the start, so that a run repeats bit for bit (docs/speed.md).
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """
    a b^T of float32 [..., m] and [n, m] on a CPU, by oneDNN. Each must be contiguous or the transpose of such a matrix;
    others are slow.
    """
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _processor() -> tuple[str, int]:
    """Vendor and family; ("", 0) where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "", 0
    found = dict(re.findall(r"^(vendor_id|cpu family)\s*: (\S+)", text, re.MULTILINE))
    return found.get("vendor_id", ""), int(found.get("cpu family", 0))


def gains(vendor: str, family: int, capability: str) -> tuple[bool, bool]:
    """Whether (`product`, `Attend`) is the faster way there, as measured by benchmarks/layer.py; `capability` is torch's."""
    zen4, zen5 = (vendor == "AuthenticAMD" and family == number for number in (25, 26))
    wide = "AVX512" in capability
    return wide and (zen4 or zen5), wide and zen5


ONEDNN, BY_HEAD = gains(*_processor(), torch.backends.cpu.get_cpu_capability())
if not torch.backends.mkldnn.is_available():
    ONEDNN = BY_HEAD = False
PRODUCT_FROM = 2**23  # multiplications from which on `product` is faster, its calls being dearer
ATTEND_FROM = 2**21  # and `Attend`, a head


def _is_float_on_cpu(states: torch.Tensor) -> bool:
    return states.device.type == "cpu" and states.dtype == torch.float32


def attends_by_head(query: torch.Tensor, multiplications: int) -> bool:
    """Whether `Attend` is the way for this query [batch, heads, tokens, d_kv], with so many multiplications a head."""
    return BY_HEAD and multiplications >= ATTEND_FROM and _is_float_on_cpu(query)


class _LinearByOneDNN(torch.autograd.Function):
    """states [..., m] and weight [n, m] to [..., n]."""

    @staticmethod
    def forward(ctx, states, weight):
        ctx.save_for_backward(states, weight)
        return product(states, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        states, weight = ctx.saved_tensors
        grad = grad.contiguous()
        to_states = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_states, None
        return to_states, product(grad.flatten(0, -2).t(), states.flatten(0, -2).t())


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`; large float32 products on a CPU go by oneDNN where that is faster."""
    ours = (
        ONEDNN
        and _is_float_on_cpu(states)
        and _is_float_on_cpu(weight)
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )
    if not ours or states.numel() * len(weight) < PRODUCT_FROM:
        return nn.functional.linear(states, weight, bias)
    made = _LinearByOneDNN.apply(states.contiguous(), weight)
    return made if bias is None else made + bias


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, states):
        return linear(states, self.weight, self.bias)


def use_in(model: nn.Module) -> nn.Module:
    """Make every plain `nn.Linear` of any model compute by `linear`; weights and names stay. Returns `model`."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
    return model


class Attend(torch.autograd.Function):
    """
    softmax(q k^T + bias + mask) v on a CPU, a head at a time, the weights computed again in the backward pass: what is
    worked on stays in the processor's cache, and what is kept is linear in the length. (torch's own such kernel for
    CPUs gives no gradient for the bias.)
    """

    @staticmethod
    def forward(ctx, query, key, value, bias, mask, dropout):
        """
        Args:
            query, key, value: float32 [batch, heads, tokens, d_kv], contiguous.
            bias: [1, heads, queries, keys] or None.
            mask: [batch, 1, 1 or queries, keys] or None; gets no gradient.
            dropout: probability, of the weights.

        Returns:
            [batch, heads, queries, d_kv]
        """
        ctx.dropout, ctx.seed = dropout, int(torch.randint(2**62, ())) if dropout > 0 else 0
        made = torch.empty_like(query)
        for row, head, weights, kept in _weights_by_head(query, key, bias, mask, dropout, ctx.seed):
            dropped = weights if kept is None else weights.mul_(kept)
            made[row, head] = product(dropped, value[row, head].t())
        ctx.save_for_backward(query, key, value, bias, mask, made)
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, bias, mask, made = ctx.saved_tensors
        grad = grad.contiguous()
        to_query, to_key, to_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        to_bias = torch.empty_like(bias) if ctx.needs_input_grad[3] else None
        along = (grad * made).sum(dim=-1, keepdim=True)  # over the keys, the sum of weights times their gradients
        for row, head, weights, kept in _weights_by_head(query, key, bias, mask, ctx.dropout, ctx.seed):
            q, k, v, g = (tensor[row, head] for tensor in (query, key, value, grad))
            to_scores = product(g, v)
            dropped = weights
            if kept is not None:
                dropped = weights * kept
                to_scores *= kept
            to_scores.sub_(along[row, head]).mul_(weights)
            to_value[row, head] = product(g.t(), dropped.t()).t()  # faster than the transposed product
            to_key[row, head] = product(q.t(), to_scores.t()).t()
            to_query[row, head] = product(to_scores, k.t())
            if to_bias is not None and row == 0:
                to_bias[0, head] = to_scores
            elif to_bias is not None:
                to_bias[0, head] += to_scores
        return to_query, to_key, to_value, to_bias, None, None


def _weights_by_head(query, key, bias, mask, dropout: float, seed: int) -> Iterator[tuple]:
    """
    Each head of each row: (row, head, attention weights [queries, keys], kept); `kept` is 1 / (1 - dropout) at a weight
    that stays and 0 at others, the same for the same seed, or None without dropout.
    """
    generator = torch.Generator().manual_seed(seed) if dropout > 0 else None
    for row, head in itertools.product(range(query.shape[0]), range(query.shape[1])):
        weights = product(query[row, head], key[row, head])
        if bias is not None:
            weights += bias[0, head]
        if mask is not None:
            weights += mask[row, 0]
        torch.softmax(weights, dim=-1, out=weights)
        kept = None
        if dropout > 0:
            kept = torch.empty_like(weights).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
        yield row, head, weights, kept
