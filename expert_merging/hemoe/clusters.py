"""Clusters of equal size of the rows of a matrix, for MoEfication and for modules."""

import numpy as np

from expert_merging.hemoe.transport import assign


def balanced_clusters(rows: np.ndarray, count: int, seed: int, iterations: int = 20) -> np.ndarray:
    """The cluster [N] of each row of `rows` [N, d], by k-means on rows of length 1 with all clusters of equal size.

    Starts from scikit-learn's k-means, then moves rows (the exact assignment) and centres in turn until no row moves.
    Where `count` does not divide N, sizes differ by one.
    """
    from sklearn.cluster import KMeans

    units = np.asarray(rows, dtype=np.float32)
    units = units / np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-12)
    centres = KMeans(n_clusters=count, n_init=1, random_state=seed).fit(units).cluster_centers_
    least, most = np.full(count, len(units) // count), np.full(count, -(-len(units) // count))
    labels: np.ndarray | None = None
    for _ in range(iterations):
        # |x - c|^2 = |x|^2 - 2 x.c + |c|^2, and |x| moves nobody.
        nearer = assign(2 * (units @ centres.T) - (centres**2).sum(1), least, most)
        if labels is not None and (nearer == labels).all():
            break
        labels = nearer
        centres = np.stack([units[labels == cluster].mean(0) for cluster in range(count)])
    assert labels is not None  # the first iteration gives some
    return labels
