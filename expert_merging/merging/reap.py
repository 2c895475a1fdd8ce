"""REAP (Lasby et al. 2026, "REAP the Experts"): the experts with the largest router-weighted output stay, the others go."""

from expert_merging.merging.pooled import Observed, Pool, highest


def reap(pool: Pool, observed: Observed, target: int, layer: int) -> tuple[Pool, list[list[int]]]:
    """The `target` experts with the largest mean of gate times norm of the output, over the tokens that were sent to them.

    Arguments and result as of `pooled.Bring`.
    """
    kept = highest(observed.saliency, target)
    return pool.kept(kept), [[e] for e in kept]
