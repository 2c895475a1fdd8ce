"""Exact assignment of many items to a few groups of bounded sizes, for the largest total profit.

The transportation problem max sum_i profit[i, label_i], low <= sizes <= high. Its best value as a function of the sizes
is M-concave, so that moving one item at a time from a group to another, along the best path of groups, ends at the optimum
(Murota, Discrete Convex Analysis, 2003). Prices found by coordinate descent on the dual bring the start close.
"""

import numpy as np


def assign(profit: np.ndarray, low: np.ndarray, high: np.ndarray, prices: np.ndarray | None = None) -> np.ndarray:
    """The group [items] of each item for the largest sum of `profit` [items, groups], low <= sizes <= high [groups].

    `prices` [groups], where given, are where the search starts; they change the time, not the value. The caller sees to
    sum(low) <= items <= sum(high).
    """
    items, groups = profit.shape
    profit = np.ascontiguousarray(profit, dtype=np.float64)
    low, high = np.asarray(low), np.asarray(high)
    prices = dual_prices(profit, low, high, prices)
    labels = (profit - prices).argmax(1)
    sizes = np.bincount(labels, minlength=groups)
    # cost[e, f]: the least that moving an item from e to f loses, and which item that is.
    cost, which = np.full((groups, groups), np.inf), np.zeros((groups, groups), dtype=np.int64)
    for group in range(groups):
        _refresh(profit, labels, group, cost, which)
    scale = np.abs(profit).max(initial=1e-300)
    far = 1e6 * scale * groups  # more than any path can gain: mending a size comes first
    while True:
        give = np.where(sizes > high, -far, np.where(sizes > low, 0.0, far))
        take = np.where(sizes < low, -far, np.where(sizes < high, 0.0, far))
        loss, previous = _shortest_paths(cost, give, 1e-13 * scale)
        sink = int((loss + take).argmin())
        if loss[sink] + take[sink] >= -1e-12 * scale:
            return labels
        path = [sink]
        while previous[path[-1]] >= 0:
            path.append(int(previous[path[-1]]))
        path.reverse()
        moved = [which[e, f] for e, f in zip(path[:-1], path[1:], strict=True)]
        labels[moved] = path[1:]
        sizes[path[0]] -= 1
        sizes[sink] += 1
        for group in path:
            _refresh(profit, labels, group, cost, which)


def _refresh(profit: np.ndarray, labels: np.ndarray, group: int, cost: np.ndarray, which: np.ndarray) -> None:
    members = np.flatnonzero(labels == group)
    if not len(members):
        cost[group] = np.inf
        return
    losses = profit[members, group][:, None] - profit[members]
    best = losses.argmin(0)
    cost[group], which[group] = losses[best, np.arange(losses.shape[1])], members[best]
    cost[group, group] = 0.0


def _shortest_paths(cost: np.ndarray, start: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Bellman-Ford from outside, entering at each group for `start`: (distance, the group before or -1)."""
    distance, previous = start.copy(), np.full(len(start), -1)
    for _ in range(len(start)):
        through = distance[:, None] + cost
        best = through.argmin(0)
        reached = through[best, np.arange(len(start))]
        shorter = reached < distance - tolerance
        if not shorter.any():
            break
        distance[shorter], previous[shorter] = reached[shorter], best[shorter]
    return distance, previous


def dual_prices(
    profit: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    prices: np.ndarray | None = None,
    sweeps: int = 20,
    enough: float = -np.inf,
) -> np.ndarray:
    """Prices [groups] at which the items' own choices nearly have the sizes wanted.

    At any prices sum_i max_e (profit - price) + sum_e max(high price, low price) is above what any assignment reaches;
    here it is lowered one price at a time, from `prices` (zeros unless given), until it is `enough`.
    """
    items, groups = profit.shape
    prices = np.zeros(groups) if prices is None else np.array(prices, dtype=np.float64)
    net = np.ascontiguousarray((profit - prices).T)  # [groups, items]
    for _ in range(sweeps):
        changed = False
        for group in range(groups):
            others = np.delete(net, group, axis=0).max(0, initial=-np.inf)
            margin = np.sort(net[group] - others)[::-1]  # how much dearer it may get before each leaves it
            # With `high` inside the price may be above 0, with `low` inside below; else it is 0.
            fits = margin[high[group]] if high[group] < items else -np.inf
            keeps = margin[low[group] - 1] if low[group] > 0 else np.inf
            step = -prices[group]
            if prices[group] + fits > 0:
                step = fits
            elif prices[group] + keeps < 0:
                step = keeps
            if step != 0.0:
                net[group] -= step
                prices[group] += step
                changed = True
        if not changed or net.max(0).sum() + np.maximum(high * prices, low * prices).sum() <= enough:
            break
    return prices
