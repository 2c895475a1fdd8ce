"""The noisy top-k gate and its balance loss (Shazeer et al. 2017, sections 2.1, 4 and appendix A), as MEO uses them."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NOISE_FLOOR = 0.01  # added to the noise's standard deviation


class Routing(NamedTuple):
    """What the gate decides for R rows (tokens, sequences or tasks), in float32.

    weights [R, k] sum to 1 a row; experts [R, k] are their numbers; gates [R, n] is the same with zeros elsewhere;
    chosen [R, n] is, in training, how likely noise drawn again would choose the expert, else 1 or 0.
    """

    weights: Tensor
    experts: Tensor
    gates: Tensor
    chosen: Tensor

    def at(self, rows: Tensor) -> "Routing":
        """The routing of these rows, which may repeat."""
        return Routing(*(part[rows] for part in self))


def noisy_top_k(u: Tensor, w_gate: Tensor, w_noise: Tensor, k: int, training: bool) -> Routing:
    """Choose k of n experts for each row of u [R, d]; w_gate and w_noise are [d, n].

    Softmax is taken after the choice. In training the logits carry Gaussian noise of learnt size.
    """
    with without_autocast(u):
        clean = u.float() @ w_gate.float()
        noisy = clean
        if training:
            sd = F.softplus(u.float() @ w_noise.float()) + NOISE_FLOOR
            noisy = clean + torch.randn_like(clean) * sd
    n = clean.shape[-1]
    best, experts = noisy.topk(min(k + 1, n), dim=-1)
    weights, experts = best[:, :k].softmax(-1), experts[:, :k]
    gates = torch.zeros_like(clean).scatter(-1, experts, weights)
    if training and k < n:
        last_in, first_out = best[:, k - 1 : k], best[:, k:]
        threshold = torch.where(noisy > first_out, first_out, last_in)
        chosen = torch.special.ndtr((clean - threshold) / sd)
    else:
        chosen = torch.zeros_like(clean).scatter(-1, experts, 1.0)
    return Routing(weights, experts, gates, chosen)


def balance_loss(routing: Routing, count: Tensor | None = None) -> Tensor:
    """CV^2(importance) + CV^2(load) over the n experts, without its factor; 0 for n = 1.

    Args:
        count: [R], how often each row counts (0 for padding); once by default.
    """
    gates, chosen = routing.gates, routing.chosen
    if count is not None:
        gates, chosen = (part * count.to(part.dtype)[:, None] for part in (gates, chosen))
    return cv_squared(gates.sum(0)) + cv_squared(chosen.sum(0))


def cv_squared(values: Tensor) -> Tensor:
    """Squared coefficient of variation of values [n], by the unbiased variance."""
    if len(values) == 1:
        return values.new_zeros(())
    return values.var() / (values.mean() ** 2 + 1e-10)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Compute in the tensors' own types, also where autocast is on."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
