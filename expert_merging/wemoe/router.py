"""The router of WEMoE: from the states that enter a feed-forward layer to a weight for each task vector."""

import torch
import torch.nn.functional as F
from torch import nn


class Router(nn.Module):
    """Weights of T task vectors for each token: a linear map (depth 1), one behind a hidden layer (2), or constants (0).

    They are neither normalised nor clipped, and start near lam (arXiv 2402.00433, section 3.2; weights with a standard
    deviation of 0.01, as both released codes have it, where the paper says variance). Parameters stay in float32, and so
    does what is computed here, whatever dtype the model is moved to.

    Raises ValueError for another depth.
    """

    def __init__(
        self, hidden_size: int, experts: int, depth: int = 2, lam: float = 0.3, generator: torch.Generator | None = None
    ):
        super().__init__()
        if depth not in (0, 1, 2):
            raise ValueError(f"the depth of a router is {depth}; it must be 0, 1 or 2")
        self.depth = depth
        self.bias = nn.Parameter(torch.full((experts,), float(lam)))
        if depth > 0:
            self.weight = nn.Parameter(torch.empty(experts, hidden_size).normal_(std=0.01, generator=generator))
        if depth > 1:
            self.hidden_weight = nn.Parameter(
                torch.empty(hidden_size, hidden_size).normal_(std=0.01, generator=generator)
            )
            self.hidden_bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """states [..., tokens, hidden] -> weights of each token [..., tokens, T]; at depth 0 just [T]."""
        if self.depth == 0:
            return self.bias
        states = states.to(self.bias.dtype)
        if self.depth == 2:
            states = F.relu(F.linear(states, self.hidden_weight, self.hidden_bias))
        return F.linear(states, self.weight, self.bias)

    def of_sequences(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The mean over tokens of their weights: [batch, tokens, hidden] -> [batch, T]; at depth 0 [1, T].

        `mask` [batch, tokens] is 0 or False where a token is padding; such tokens have no say.
        """
        if self.depth == 0:
            return self.bias.unsqueeze(0)
        with torch.autocast(states.device.type, enabled=False):
            weights = self(states)
            if mask is None:
                return weights.mean(dim=1)
            mask = mask.to(weights.dtype).unsqueeze(-1)
            return (weights * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def _apply(self, fn, recurse=True):
        """Move to where `fn` moves tensors, but keep the dtype: bfloat16 would round the steps of adaptation away."""
        if any(parameter.is_meta for parameter in self.parameters()):
            return super()._apply(fn, recurse)
        device = fn(self.bias.detach().new_zeros(0)).device
        return super()._apply(lambda tensor: tensor.to(device), recurse)
