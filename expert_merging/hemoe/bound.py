"""How good a solution of HEMoE's integer program can be at best, and often a proof that the one at hand is.

That every item has one expert is relaxed, with a price pi_i an item (Lagrange). What is left falls apart by the sets of
domains that an expert may serve: a set S is worth f(S), the sum of the best low..high net scores sum_{c in S} s[i,c] - pi_i,
and a small linear program picks n sets that together serve each domain q times at most. sum(pi) plus its value bounds
every solution, and subgradient steps on pi lower it. A set whose reduced cost exceeds the gap is in no better
solution and is dropped; when few ways to pick n sets are left, each is solved, and the best of them is the optimum.
"""

import time

import numpy as np

from expert_merging.hemoe.transport import assign, dual_prices

WIDEST = 3e7  # items x sets of domains: 8,192 x 255 is 2e6; beyond, only the cheap bound is given
CANDIDATES = 400  # ways to pick the sets that are tried one by one, at most
TRIED = 10  # where there are more, this many of them, for a better solution


def tighten(problem, serves: np.ndarray, value: float, bound: float, seconds: float, steps: int = 200):
    """(serves, value, bound) where `value` and `serves` [n, D] may have become better and `bound` lower.

    `bound` equal to `value` is a proof, up to rounding. Stops after `steps` or `seconds`.
    """
    items, domains = problem.scores.shape
    if items * 2.0**domains > WIDEST:
        return serves, value, bound
    until = time.monotonic() + seconds
    numbers = np.arange(1, 2**domains)
    sets = (numbers[:, None] >> np.arange(domains) & 1).astype(np.float64)  # [sets, D]
    worth = sets @ problem.scores.T  # [sets, items]
    profit = problem.scores @ serves.T.astype(np.float64)
    pi = (profit - dual_prices(profit, problem.lows, problem.highs)).max(1)
    momentum, pace, waited, tried = np.zeros(items), 1.0, 0, set()
    for step in range(steps):
        net = worth - pi
        f = _worth(net, problem.low, problem.high)
        picked, domain_prices, price = _pick(problem, sets, f)
        now = float(pi.sum() + problem.per_domain * domain_prices.sum() + problem.experts * price)
        if now < bound:
            bound, waited = now, 0
        else:
            waited += 1
            if waited == 8:
                pace, waited = pace / 2, 0
        room = now - value + 1e-9 * value
        reduced = sets @ domain_prices + price - f
        if bound <= value * (1 + 1e-9):
            return serves, value, max(value, bound)
        if step % 10 == 0:
            for part in (1 / 64, 1 / 16, 1 / 4, 1):  # the most promising ones first: what they gain spares others
                ways, complete = _ways(problem, sets, reduced, domain_prices, part * room)
                new = [(cost, way) for cost, way in ways if way.tobytes() not in tried]
                # Lowering the bound is cheaper than trying many: that is for when it hardly falls any more.
                complete &= len(new) <= 3 * TRIED or pace < 0.2
                for cost, way in new if complete else new[:TRIED]:
                    if cost <= now - value:
                        tried.add(way.tobytes())
                        better = _solved(problem, way, value)
                        if better is not None:
                            serves, value = way, better
                if not complete:
                    break
                if part == 1 or part * room >= now - value:
                    return serves, value, value  # every way not tried is below
            room = now - value + 1e-9 * value
        if time.monotonic() > until:
            break
        gradient = np.ones(items)
        for number in np.flatnonzero(picked > 1e-9):
            gradient[_taken(net[number], problem.low, problem.high)] -= picked[number]
        momentum = gradient + 0.7 * momentum
        length = momentum @ momentum
        if length == 0:
            break
        pi = pi - pace * (now - value) / length * momentum
        keep = reduced <= room
        sets, worth = sets[keep], worth[keep]
    return serves, value, bound


def _worth(net: np.ndarray, low: int, high: int) -> np.ndarray:
    """f of each set: the sum of its positive net scores [sets, items], but of `low` at least and `high` at most."""
    positive = net > 0
    counts = positive.sum(1)
    f = np.where(positive, net, 0).sum(1)
    for number in np.flatnonzero((counts > high) | (counts < low)):
        f[number] = net[number, _taken(net[number], low, high)].sum()
    return f


def _taken(net: np.ndarray, low: int, high: int) -> np.ndarray:
    """The items that an expert takes at net scores `net` [items]."""
    count = int(np.clip((net > 0).sum(), low, high))
    return np.argpartition(-net, count - 1)[:count]


def _pick(problem, sets: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(how often each set is picked, perhaps in fractions; dual prices [D] of the domains; that of an expert)."""
    from scipy.optimize import linprog

    solved = linprog(
        -f, A_ub=sets.T, b_ub=np.full(sets.shape[1], problem.per_domain), A_eq=np.ones((1, len(f))),
        b_eq=[problem.experts], bounds=(0, None), method="highs-ds",
    )  # fmt: skip
    domain_prices = np.maximum(-solved.ineqlin.marginals, 0)
    # The least price that no set is worth more than: a bound must hold beyond the solver's tolerance.
    return solved.x, domain_prices, float((f - sets @ domain_prices).max())


def _ways(
    problem, sets: np.ndarray, reduced: np.ndarray, unused: np.ndarray, room: float
) -> tuple[list[tuple[float, np.ndarray]], bool]:
    """([(cost, y bool [n, D])], whether that is all): ways to pick n sets whose cost is `room` at most, cheapest first.

    The cost is the sum of the sets' reduced costs and of `unused` [D] for each expert that a domain could still have. Ways
    that differ in the order of experts alone are one. There are more where the search is cut off.
    """
    order = np.argsort(reduced, kind="stable")
    order = order[reduced[order] <= room]
    costs, members = reduced[order].tolist(), sets[order].astype(int).tolist()
    holding = [[i for i, member in enumerate(members) if member[domain]] for domain in range(sets.shape[1])]
    found: list[tuple[float, np.ndarray]] = []
    visited = 0

    def extend(domain: int, first: int, free: list[int], left: int, cost: float, chosen: list[int]) -> None:
        """All completions whose further sets hold no domain before `domain`, nor it in sets before `first` of its own."""
        nonlocal visited
        visited += 1
        if visited > 100 * CANDIDATES or len(found) > CANDIDATES or sum(free) < left:
            return
        if domain == len(free):
            found.append((cost, np.array([members[i] for i in sorted(chosen)], dtype=bool)))
            return
        if free[domain] and left:
            for place in range(first, len(holding[domain])):
                number = holding[domain][place]
                if cost + costs[number] > room:
                    break  # those after it cost no less
                if all(map(int.__le__, members[number], free)):
                    rest = [a - b for a, b in zip(free, members[number], strict=True)]
                    extend(domain, place, rest, left - 1, cost + costs[number], [*chosen, number])
        cost += free[domain] * unused[domain]
        if cost <= room:
            extend(domain + 1, 0, [*free[:domain], 0, *free[domain + 1 :]], left, cost, chosen)

    extend(0, 0, [problem.per_domain] * sets.shape[1], problem.experts, 0.0, [])
    complete = visited <= 100 * CANDIDATES and len(found) <= CANDIDATES
    return sorted(found, key=lambda one: one[0]), complete


def _solved(problem, serves: np.ndarray, value: float) -> float | None:
    """The value of the best items for `serves`, where it is above `value`."""
    kinds, times = np.unique(serves, axis=0, return_counts=True)  # experts alike are one group (solver.best_items)
    profit, low, high = problem.scores @ kinds.T.astype(np.float64), problem.low * times, problem.high * times
    prices = dual_prices(profit, low, high, enough=value)
    above = (profit - prices).max(1).sum() + np.maximum(high * prices, low * prices).sum()
    if above <= value * (1 + 1e-12):
        return None
    labels = assign(profit, low, high, prices)
    found = float(profit[np.arange(len(labels)), labels].sum())
    return found if found > value * (1 + 1e-12) else None
