"""Bringing pooled experts to fewer: cases worked by hand, properties, and what is observed against a plain reading."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_merging.merging import floors, hc_smoe, m_smoe, pooled, reap
from expert_merging.merging.pooled import Observed, Pool
from expert_merging.merging.registry import POOLED

EYE = torch.eye(2)


def observed(frequency=(), similarity=None, outputs=None, saliency=()):
    size = len(frequency) or len(saliency) or len(outputs)
    return Observed(
        torch.tensor(frequency or [1 / size] * size, dtype=torch.float64),
        torch.eye(size) if similarity is None else similarity,
        torch.zeros(size, 2) if outputs is None else outputs,
        torch.tensor(saliency or [1.0] * size, dtype=torch.float64),
    )


def random_pool(seed, experts=6, d_ff=5, d_model=4):
    random = torch.Generator().manual_seed(seed)
    shapes = (experts, d_ff, d_model), (experts, d_model, d_ff), (experts, d_model)
    return Pool(*(torch.randn(shape, generator=random) for shape in shapes))


def random_observed(seed, experts=6, d_model=4):
    random = torch.Generator().manual_seed(100 + seed)
    frequency = torch.rand(experts, generator=random, dtype=torch.float64)
    logits = torch.randn(20, experts, generator=random)
    similarity = torch.nn.functional.cosine_similarity(logits[:, :, None], logits[:, None], dim=0)
    outputs, saliency = torch.randn(experts, d_model, generator=random), torch.rand(experts, generator=random)
    return Observed(frequency / frequency.sum(), similarity, outputs, saliency.double())


def value(pool, e, x):
    return pool.wo[e] @ torch.relu(pool.wi[e] @ x)


def test_m_smoe_by_hand():
    wi = torch.stack([EYE, 5 * EYE, torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[0.0, 3], [1, 0]])])
    wo = torch.stack([EYE, EYE, EYE, torch.tensor([[0.0, 1], [1, 0]])])
    logits = np.array([[2, 1, 0, 1], [3, 2, 0, 1], [0, 1, 3, 1], [2, 1, 1, 0], [0, 0, 1, 2], [1, 0, 2, 0]], dtype=float)
    cosines = logits.T @ logits / np.outer(*[np.linalg.norm(logits, axis=0)] * 2)
    assert cosines[1, [0, 2]] == pytest.approx([0.8909, 0.3904], abs=1e-4)
    seen = observed(frequency=[1 / 2, 0.0, 1 / 3, 1 / 6], similarity=torch.tensor(cosines))
    pool = Pool(wi, wo, torch.arange(8.0).view(4, 2))
    made, members = m_smoe.m_smoe(pool, seen, 2, 0)
    assert members == [[0, 1], [2, 3]]
    assert torch.allclose(made.wi[0], EYE, atol=1e-5)  # expert 1 was never used
    assert torch.allclose(made.wi[1], torch.tensor([[1.0, 0], [0, 7 / 3]]), atol=1e-5) and torch.allclose(
        made.wo[1], EYE
    )
    assert torch.equal(made.rows, pool.rows[[0, 2]])
    assert torch.allclose(value(made, 1, torch.ones(2)), torch.tensor([1, 7 / 3]), atol=1e-5)


def test_hc_smoe_by_hand():
    pool = Pool(*(torch.tensor([10.0, 20, 30, 40]).view(shape) for shape in ((4, 1, 1), (4, 1, 1), (4, 1))))
    outputs = torch.tensor([[0.0], [1.0], [2.1], [3.4]])
    made, members = hc_smoe.hc_smoe(pool, observed(frequency=[0.4, 0.1, 0.3, 0.2], outputs=outputs), 2, 0)
    assert members == [[0, 1], [2, 3]]
    assert made.wi.flatten().tolist() == pytest.approx([12, 34], abs=1e-4) == made.rows.flatten().tolist()
    unused, _ = hc_smoe.hc_smoe(pool, observed(frequency=[0.0, 0.0, 0.5, 0.5], outputs=outputs), 2, 0)
    assert unused.wi.flatten().tolist() == pytest.approx([15, 35], abs=1e-4)


def test_reap_and_most_used_by_hand():
    pool, seen = random_pool(0, 4), observed(frequency=[0.4, 0.4, 0.2, 0.0], saliency=[0.85, 0.65, 1.2, 0.0])
    for bring, kept in ((reap.reap, [0, 2]), (floors.most_used, [0, 1])):
        made, members = bring(pool, seen, 2, 0)
        assert (
            members == [[e] for e in kept]
            and torch.equal(made.wi, pool.wi[kept])
            and torch.equal(made.rows, pool.rows[kept])
        )


def test_alignment_leaves_the_function_and_finds_a_permutation():
    pool = random_pool(1)
    order = torch.tensor([3, 1, 4, 0, 2])
    copies = Pool(
        torch.stack([pool.wi[0], pool.wi[0][order]]), torch.stack([pool.wo[0], pool.wo[0][:, order]]), pool.rows[:2]
    )
    again = m_smoe.aligned(copies, 0, 1)
    assert torch.equal(again.wi[0], pool.wi[0]) and torch.equal(again.wo[0], pool.wo[0])
    other, x = m_smoe.aligned(pool, 0, 3), torch.randn(4)
    assert torch.allclose(value(other, 0, x), value(pool, 3, x), atol=1e-5)


def bring_of(name):
    function, arguments = POOLED[name].load(), POOLED[name].arguments({"seed": 0})
    return lambda *given: function(*given, **arguments)


@pytest.mark.parametrize("name", POOLED)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), target=st.integers(1, 6))
def test_each_expert_of_the_pool_is_kept_or_in_one_group(name, seed, target):
    pool, seen = random_pool(seed), random_observed(seed)
    made, members = bring_of(name)(pool, seen, target, 0)
    assert made.wi.shape == (target, 5, 4) and made.wo.shape == (target, 4, 5) and made.rows.shape == (target, 4)
    flat = [e for group in members for e in group]
    assert len(members) == target and len(set(flat)) == len(flat)
    assert set(flat) <= set(range(6)) and (name not in ("m_smoe", "hc_smoe") or len(flat) == 6)
    if target == 6:
        order = [group[0] for group in members]
        assert torch.allclose(made.wi, pool.wi[order], rtol=1e-4) and torch.allclose(
            made.rows, pool.rows[order], rtol=1e-4
        )


def sources(experts=2):
    random = torch.Generator().manual_seed(3)
    layer, made = "encoder.block.1.layer.1.mlp", []
    for _ in range(2):
        one = {
            "shared.weight": torch.randn(3, 4, generator=random),
            f"{layer}.router.classifier.weight": torch.randn(experts, 4, generator=random),
        }
        for e in range(experts):
            one[f"{layer}.experts.expert_{e}.wi.weight"] = torch.randn(5, 4, generator=random)
            one[f"{layer}.experts.expert_{e}.wo.weight"] = torch.randn(4, 5, generator=random)
        made.append(one)
    return layer, made


@pytest.mark.parametrize("target", [1, 2, 3, 4])
def test_a_model_of_as_many_experts_as_asked_for(target):
    layer, models = sources()
    members, tensors = pooled.merge_pools(models, {layer: random_observed(0, 4)}, target, bring_of("reap"))
    made = dict(tensors)
    assert made[f"{layer}.router.classifier.weight"].shape == (target, 4) and len(members[layer]) == target
    assert len([name for name in made if ".experts." in name]) == 2 * target
    assert torch.allclose(made["shared.weight"], (models[0]["shared.weight"] + models[1]["shared.weight"]) / 2)
    for e, (kept,) in enumerate(members[layer]):
        name = "{}.experts.expert_{}.wi.weight"
        assert torch.equal(made[name.format(layer, e)], models[kept // 2][name.format(layer, kept % 2)])


def test_what_cannot_be_pooled():
    layer, models = sources()
    with pytest.raises(ValueError, match="5 experts are wanted of a pool of 4"):
        dict(pooled.merge_pools(models, {layer: random_observed(0, 4)}, 5, bring_of("reap"))[1])
    del models[1][f"{layer}.experts.expert_1.wi.weight"]
    with pytest.raises(ValueError, match="model 1 has no .*expert_1.wi.weight"):
        dict(pooled.merge_pools(models, {layer: random_observed(0, 4)}, 2, bring_of("reap"))[1])
    with pytest.raises(ValueError, match="no model"):
        pooled.merge_pools([], {}, 2, bring_of("reap"))
