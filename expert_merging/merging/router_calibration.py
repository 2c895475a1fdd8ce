"""Router calibration: the routers of a finished merge are fitted to what its sources choose; all else stays as it is.

After HARC (arXiv 2606.03391, "When Model Merging Breaks Routing"), which fits the router of a merge that keeps the slots of
its sources. Here slots may hold experts of some sources only (CAEM) or of several (averages, groups):

- g_te is the gate (softmax of its router) that source s gives its expert e for token t of its own task, in its own pass.
- q_tk, the sum of g_te over the experts e of s in slot k, is what of that the merged layer can follow. Experts that no slot
  holds are left out: q_t adds up to the kept share m_t, by which the token counts.
- The router W [slots, d_model] minimises the Kullback-Leibler divergence of its own softmax p_t = softmax(W h_t) from q_t:

      sum_t a_t m_t KL(q_t / m_t || p_t)  +  ridge / 2 * r * |W - W_0|^2

  with h_t what the merged model gives the layer for the same token, W_0 the router as merged, r the mean square of an entry
  of h, a_t = 1 / (sources * tokens of the source) so that sources count alike.

That is convex, a multinomial logistic regression with soft answers. The ridge makes the minimum one, where a vector may be
added to all rows or no token lies in a direction, and finite, where tasks can be told apart without error. Other than HARC,
this asks the source for its gates at its own state of the token and not at the merged model's, and expands nothing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

STEPS = 1000  # of L-BFGS at most; some 20 to 200 are taken


@dataclass(frozen=True)
class Fitted:
    """How near a router is to the sources' choices, as merged and calibrated, on the same tokens.

    kept: the mean share of the sources' gates that falls on experts that the merged layer has, in [0, 1].
    divergence: sum_t a_t m_t KL(q_t / m_t || p_t) / kept, in nats a token, before and after.
    agreement: the share of tokens (weighted by a_t m_t) whose most probable slot is that of q_t, before and after.
    """

    kept: float
    divergence: tuple[float, float]
    agreement: tuple[float, float]
    steps: int

    def record(self) -> dict[str, float | list[float]]:
        """For a history."""
        return {
            name: [round(one, 6) for one in value] if isinstance(value, tuple) else round(value, 6)
            for name, value in asdict(self).items()
        }


def slots_of_chosen(chosen: Sequence[Sequence[int]], experts: int) -> list[list[int]]:
    """The pool's members in each slot of a CAEM layer, to which source i gave the experts `chosen[i]`, in this order; the pool
    holds the `experts` of source 0 first (merging/pooled.py)."""
    return [[source * experts + e] for source, of_source in enumerate(chosen) for e in of_source]


def slots_of_average(sources: int, experts: int) -> list[list[int]]:
    """The same of an average slot by slot: slot e holds expert e of every source."""
    return [[source * experts + e for source in range(sources)] for e in range(experts)]


def targets(gates: torch.Tensor, source: int, slots: Sequence[Sequence[int]]) -> torch.Tensor:
    """q [tokens, slots] of the gates [tokens, experts] of a source, given the pool's members in each slot."""
    experts = gates.shape[1]
    sums = gates.new_zeros(len(gates), len(slots))
    for slot, members in enumerate(slots):
        for member in members:
            if member // experts == source:
                sums[:, slot] += gates[:, member % experts]
    return sums


def calibrated(
    states: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor, router: torch.Tensor, ridge: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Fitted]:  # fmt: skip
    """
    The router that follows the sources best, in float64 and from W_0 on: the same input gives the same bits.

    Args:
        states: h, [tokens, d_model].
        wanted: q, [tokens, slots].
        weights: a, [tokens].
        router: W_0, [slots, d_model].
        ridge: above 0, how strongly W is held to W_0.
        bias: of the router, [slots], where it has one; it stays.

    Returns:
        W in the router's dtype, and how near it is.

    Raises:
        ValueError: not a single token whose source has an expert here.
    """
    from scipy.optimize import minimize

    states, followed, weights, start = (one.double() for one in (states, wanted, weights, router))
    followed = followed * weights[:, None]
    of_token = followed.sum(-1)
    if not of_token.sum() > 0:
        raise ValueError("there is no token that a source sends to an expert of this layer")
    pull = (ridge * (weights @ states.square().mean(-1)) / weights.sum()).clamp_min(1e-30)
    offset = 0.0 if bias is None else bias.double()
    # Steps are taken in coordinates in which the curvature is about the same in all directions: 20 do in place of 500.
    curvature = (states * of_token[:, None]).T @ states / 4 + pull * torch.eye(states.shape[1]).to(states)
    to_weights = torch.linalg.inv(torch.linalg.cholesky(curvature))

    def change_of(flat) -> torch.Tensor:
        return torch.as_tensor(flat, device=states.device).view_as(start) @ to_weights

    def logs(change: torch.Tensor | float) -> torch.Tensor:
        return (states @ (start + change).T + offset).log_softmax(-1)

    def value_and_gradient(flat) -> tuple[float, object]:
        change = change_of(flat)
        found = logs(change)
        value = pull / 2 * change.square().sum() - (followed * found).sum()
        gradient = (of_token[:, None] * found.exp() - followed).T @ states + pull * change
        return value.item(), (gradient @ to_weights.T).flatten().numpy(force=True)

    def nearness(found: torch.Tensor) -> tuple[float, float]:
        apart = torch.xlogy(followed, followed / of_token[:, None].clamp_min(1e-300)) - followed * found
        same = (found.argmax(-1) == followed.argmax(-1)).double() @ of_token
        return (apart.sum() / of_token.sum()).item(), (same / of_token.sum()).item()

    options = {"maxiter": STEPS, "maxcor": 20, "gtol": 1e-7, "ftol": 1e-12}
    begin = torch.zeros(start.numel(), dtype=torch.float64).numpy()
    found = minimize(value_and_gradient, begin, jac=True, method="L-BFGS-B", options=options)
    change = change_of(found.x)
    before, after = nearness(logs(0.0)), nearness(logs(change))
    kept = (of_token.sum() / weights.sum()).item()
    fitted = Fitted(kept, (before[0], after[0]), (before[1], after[1]), int(found.nit))
    return (start + change).to(router.dtype), fitted
