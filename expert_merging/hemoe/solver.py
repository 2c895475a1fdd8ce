"""HEMoE's integer program for one layer: who goes to which expert, and which expert serves which domain.

    max  sum_e sum_c y[e,c] sum_{i in e} s[i,c]     over partitions into n experts and binary y [n, D]
    with low <= |I_e| <= high,   sum_c y[e,c] >= 1 for each expert,   sum_e y[e,c] <= q for each domain

Bilinear, but each half is easy: with y fixed, items are assigned to groups of bounded sizes (transport.py), with the
items fixed, y is a bipartite problem of degrees; both have whole-numbered optima. Alternating from several starts finds
the solution, and relaxing less and less how experts share domains gives the bound.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from expert_merging.core.errors import UserError
from expert_merging.hemoe.bound import tighten
from expert_merging.hemoe.integer_program import by_gurobi, by_highs
from expert_merging.hemoe.transport import assign

SOLVERS = ("alternating", "highs", "gurobi")
OPTIMAL_GAP = 1e-6


@dataclass(frozen=True)
class Problem:
    """`scores` [items, D], not negative; sizes are counted in items. Raises UserError where no solution exists."""

    scores: np.ndarray
    experts: int
    low: int
    high: int
    per_domain: int  # q: how many experts may serve a domain

    def __post_init__(self):
        items, domains = self.scores.shape
        check_feasible(items, domains, self.experts, self.low, self.high, self.per_domain)
        if not np.isfinite(self.scores).all() or (self.scores < 0).any():
            raise UserError("the partition needs scores that are finite and not negative")

    @property
    def lows(self) -> np.ndarray:
        return np.full(self.experts, self.low)

    @property
    def highs(self) -> np.ndarray:
        return np.full(self.experts, self.high)


@dataclass
class Solution:
    """`labels` [items], `serves` bool [n, D]; no solution is worth more than `bound`. `history` is the objective after
    every half-step of the start that led here."""

    labels: np.ndarray
    serves: np.ndarray
    objective: float
    bound: float
    seconds: float
    history: list[float]

    @property
    def gap(self) -> float:
        return max(0.0, self.bound - self.objective) / max(self.objective, 1e-300)

    @property
    def status(self) -> str:
        return "optimal" if self.gap <= OPTIMAL_GAP else "bounded"


def check_feasible(items: int, domains: int, experts: int, low: int, high: int, per_domain: int) -> None:
    """Raises UserError that says which of the constraints cannot hold together."""
    if experts < 1 or domains < 1 or items < 1:
        raise UserError(f"a partition needs items, experts and domains; there are {items}, {experts} and {domains}")
    if experts > items:
        raise UserError(f"{experts} experts cannot be made of {items} neurons or modules; ask for fewer experts")
    if low < 1 or low > high:
        raise UserError(f"experts of {low} to {high} neurons or modules do not exist; the size ratio must be 1 or more")
    if experts * low > items:
        raise UserError(f"{experts} experts of at least {low} need {experts * low} of the {items} items; fewer experts")
    if experts * high < items:
        raise UserError(
            f"{experts} experts of at most {high} hold {experts * high} of the {items} items; raise the ratio"
        )
    if per_domain < 1 or per_domain > experts:
        raise UserError(
            f"a domain is served by up to {per_domain} experts; that must be 1 to {experts}, how many there are"
        )
    if experts > domains * per_domain:
        raise UserError(
            f"{experts} experts shall serve a domain each, but {domains} domains with {per_domain} experts each have room "
            f"for {domains * per_domain}; allow more experts a domain, or make fewer experts"
        )


def objective(scores: np.ndarray, labels: np.ndarray, serves: np.ndarray) -> float:
    """sum over items of what their expert's domains score."""
    return float((scores * serves[labels]).sum())


def expert_values(problem: Problem, labels: np.ndarray) -> np.ndarray:
    """What each expert's items score in each domain [n, D]."""
    values = np.zeros((problem.experts, problem.scores.shape[1]))
    np.add.at(values, labels, problem.scores)
    return values


def best_items(problem: Problem, serves: np.ndarray) -> np.ndarray:
    """The half-step of the items: labels [items] of the best partition for the domains `serves` [n, D] says."""
    # Experts that serve the same domains are one group first: what is alike would be moved about one by one.
    kinds, kind = np.unique(serves, axis=0, return_inverse=True)
    times = np.bincount(kind)
    groups = assign(problem.scores @ kinds.T.astype(np.float64), problem.low * times, problem.high * times)
    labels = np.empty(len(groups), dtype=np.int64)
    for number in range(len(kinds)):
        its_experts = np.flatnonzero(kind == number)
        for expert, items in zip(
            its_experts, np.array_split(np.flatnonzero(groups == number), times[number]), strict=True
        ):
            labels[items] = expert
    return labels


def best_serves(problem: Problem, values: np.ndarray) -> np.ndarray:
    """The half-step of the domains: the best y bool [n, D] for `values` [n, D]."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, eye_array, kron, vstack

    n, domains = values.shape
    top = np.argsort(-values, axis=0, kind="stable")[: problem.per_domain]
    serves = np.zeros((n, domains), dtype=bool)
    np.put_along_axis(serves, top, True, axis=0)
    if serves.any(1).all():
        return serves  # the q best of each domain, and nobody is left idle
    of_domain = kron(np.ones((1, n)), eye_array(domains))
    of_expert = kron(eye_array(n), np.ones((1, domains)))
    solved = linprog(
        -values.ravel(), A_ub=csr_array(vstack([of_domain, -of_expert])), bounds=(0, 1), method="highs-ds",
        b_ub=np.r_[np.full(domains, problem.per_domain), -np.ones(n)],
    )  # fmt: skip
    return solved.x.reshape(n, domains) > 0.5  # totally unimodular: the vertex found is whole


def climb(problem: Problem, serves: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Alternate both half-steps from `serves` until neither gains: (labels, serves, objective after each half-step)."""
    history = []
    while True:
        labels = best_items(problem, serves)
        history.append(objective(problem.scores, labels, serves))
        serves = best_serves(problem, expert_values(problem, labels))
        history.append(objective(problem.scores, labels, serves))
        if len(history) > 2 and history[-1] <= history[-3] * (1 + 1e-12):
            return labels, serves, history


def starts(problem: Problem, count: int, seed: int) -> Iterator[np.ndarray]:
    """`count` feasible y [n, D]: in turn one with some experts that serve all domains, and one at random."""
    random = np.random.default_rng(seed)
    n, domains, q = problem.experts, problem.scores.shape[1], problem.per_domain
    for number in range(count):
        serves = np.zeros((n, domains), dtype=bool)
        everywhere = 0
        if number % 2 == 0:  # 1, 2, ... up to as many as leave a place for each other expert, and again
            most = max(u for u in range(min(q, n) + 1) if n - u <= domains * (q - u))
            everywhere = number // 2 % most + 1 if most else 0
        serves[:everywhere] = True
        left = q - everywhere
        if left:
            # A place in a domain for every other expert, then the places still free.
            places = random.permutation(np.repeat(np.arange(domains), left))
            serves[np.arange(everywhere, n), places[: n - everywhere]] = True
            for domain in range(domains):
                free = np.flatnonzero(~serves[:, domain])
                serves[random.permutation(free)[: q - int(serves[:, domain].sum())], domain] = True
        yield serves


def cheap_bound(problem: Problem) -> float:
    """Each domain served by its best items, as many as q experts of the greatest size hold."""
    count = min(problem.per_domain * problem.high, len(problem.scores))
    return float(np.sort(problem.scores, axis=0)[-count:].sum())


def solve(
    problem: Problem, solver: str = "alternating", count: int = 8, seed: int = 0, seconds: float = 60.0
) -> Solution:
    """A solution and its bound, in about `seconds`.

    "alternating": the best of `count` starts (at least one; no other begins after half of the time), then the bound of
    bound.py, which often proves it optimal or finds the optimum. "highs" and "gurobi": the integer program as it is.
    Raises UserError where those found nothing in time.
    """
    started = time.monotonic()
    if solver == "alternating":
        best: tuple[np.ndarray, np.ndarray, list[float]] | None = None
        for serves in starts(problem, count, seed):
            labels, serves, history = climb(problem, serves)
            if best is None or history[-1] > best[2][-1]:
                best = labels, serves, history
            if time.monotonic() - started > seconds / 2:
                break
        assert best is not None  # `count` is at least one
        labels, serves, history = best
        left = max(0.0, seconds - (time.monotonic() - started))
        better, _, bound = tighten(problem, serves, history[-1], cheap_bound(problem), left)
        if better is not serves:
            labels, serves, history = climb(problem, better)
    else:
        by = by_highs if solver == "highs" else by_gurobi
        labels, serves, bound = by(problem, seconds, *([seed] if solver == "gurobi" else []))
        if labels is None:
            raise UserError(f"{solver} found no solution in {seconds:g} s; give it more, or use solver alternating")
        history = [objective(problem.scores, labels, serves)]
    return Solution(labels, serves, history[-1], max(bound, history[-1]), time.monotonic() - started, history)
