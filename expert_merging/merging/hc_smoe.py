"""HC-SMoE (Chen et al. 2025, "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering"): clusters of experts with
alike mean outputs, weights averaged by use."""

from expert_merging.merging.pooled import Observed, Pool, joined, merged_group


def hc_smoe(pool: Pool, observed: Observed, target: int, layer: int) -> tuple[Pool, list[list[int]]]:
    """
    Agglomerative clustering of the experts' mean outputs, Euclidean distance, average linkage, down to `target` clusters; in
    each, experts and router rows are averaged by use.

    Arguments and result as of `pooled.Bring`.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage

    tree = linkage(observed.outputs.double().numpy(force=True), method="average", metric="euclidean")
    labels = cut_tree(tree, n_clusters=target)[:, 0].tolist()
    clusters = [[e for e, label in enumerate(labels) if label == cluster] for cluster in dict.fromkeys(labels)]
    return joined([merged_group(pool, cluster, observed.frequency) for cluster in clusters]), clusters
