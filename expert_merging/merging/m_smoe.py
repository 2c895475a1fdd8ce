"""M-SMoE (Li et al. 2024, "Merge, Then Compress"): groups by router logits around the most used experts, units
aligned, weights averaged by use."""

import torch

from expert_merging.merging.pooled import Observed, Pool, highest, joined, merged_group


def m_smoe(pool: Pool, observed: Observed, target: int, layer: int) -> tuple[Pool, list[list[int]]]:
    """
    The `target` most used experts of the pool are dominant; each other one joins the dominant whose router logits have the
    largest cosine with its own (of equals the more used one). A group's hidden units are put in the dominant's order and its
    weights averaged by use; the dominant's router row stays.

    Arguments and result as of `pooled.Bring`.
    """
    dominant = highest(observed.frequency, target)
    by_use = sorted(dominant, key=lambda e: (-observed.frequency[e].item(), e))
    groups = {e: [e] for e in dominant}
    for expert in range(len(pool.rows)):
        if expert not in groups:
            groups[max(by_use, key=lambda e: observed.similarity[expert, e].item())].append(expert)
    made, members = [], []
    for e, group in groups.items():
        part = joined([pool.kept([e]), *(aligned(pool, e, other) for other in group[1:])])
        merged = merged_group(part, range(len(group)), observed.frequency[group])
        made.append(Pool(merged.wi, merged.wo, pool.rows[e][None]))
        members.append(group)
    return joined(made), members


def aligned(pool: Pool, first: int, other: int) -> Pool:
    """Expert `other` with its hidden units permuted so as to resemble those of expert `first`: the same function.

    Maximises sum_a C[a, p(a)] over permutations p, C = wi_first wi_other^T + wo_first^T wo_other [d_ff, d_ff].
    """
    from scipy.optimize import linear_sum_assignment

    alike = pool.wi[first] @ pool.wi[other].T + pool.wo[first].T @ pool.wo[other]
    _, order = linear_sum_assignment(alike.numpy(force=True), maximize=True)
    units = torch.as_tensor(order)
    return Pool(pool.wi[other][units][None], pool.wo[other][:, units][None], pool.rows[other][None])
