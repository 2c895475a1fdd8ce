"""Iso-C and TSV-M: worked examples, a plain NumPy reading of the formulas, what must not matter, and fusion-bench."""

import sys
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_methods import fusion_bench_file

from expert_merging.merging.iso_c import iso_c
from expert_merging.merging.registry import AVERAGED
from expert_merging.merging.tsv_m import tsv_m

few = settings(max_examples=25)
seeds, sizes = st.integers(0, 10_000), st.integers(3, 9)
TALL = [[[2, 1], [0, 0], [0, 1]], [[1, 0], [0, 2], [1, 0]]]


def added(method, changes, base=None, name="w", **settings):
    """What `method` adds to a tensor to which fine-tuning has added `changes`; the base is 0 in float64, or given."""
    changes = [torch.as_tensor(change, dtype=torch.float64) for change in changes]
    base = torch.zeros_like(changes[0]) if base is None else base
    merged = dict(method({name: base}, [{name: base + change} for change in changes], **settings))
    return merged[name] - base


def random(seed, number, *shape):
    """Matrices that have full rank, as their sum has."""
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape) for _ in range(number)]


def near(a, b, tolerance=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance, check_dtype=False
    )


# ---------------------------------------------------------------- Iso-C


def iso_c_in_numpy(changes):
    total = sum(changes)
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    return s.mean() * u @ vt


def test_iso_c_worked_by_hand():
    near(added(iso_c, [[[1, 2], [0, 0]], [[0, 0], [3, 0]]]), [[0.5, 2.5], [2.5, -0.5]])
    tall = added(iso_c, TALL)
    near(tall, [[2.5553, 0.3492], [-0.6030, 2.5076], [0.6508, 0.9523]], 1e-4)
    assert tall.norm().item() == pytest.approx(3.8253, abs=1e-4)
    near(added(iso_c, [[1, 2], [3, 0]], scale=1.5), [3, 1.5])
    near(added(iso_c, [[[3, 0], [0, 0]], [[0, 0], [0, 1]]]), 2 * np.eye(2))


@few
@given(seeds, st.integers(1, 4), sizes, sizes)
def test_iso_c_is_the_sum_with_equal_singular_values(seed, number, rows, columns):
    changes = random(seed, number, rows, columns)
    ours = added(iso_c, changes, scale=0.7)
    near(ours, 0.7 * iso_c_in_numpy(changes))
    total = torch.as_tensor(sum(changes))
    assert torch.linalg.svdvals(ours).sum() == pytest.approx(0.7 * torch.linalg.svdvals(total).sum().item())
    assert ours.norm() <= 0.7 * total.norm() + 1e-9


def test_iso_c_makes_up_no_direction(recwarn):
    """Of a sum of rank 2 only two directions are there; the divisor stays 3."""
    change = np.zeros((4, 3))
    change[0, 0], change[1, 1] = 4, 2
    found = added(iso_c, [change, 0 * change], name="a.weight")
    wanted = np.zeros((4, 3))
    wanted[0, 0] = wanted[1, 1] = 2
    near(found, wanted)
    assert "the first a.weight (2 of 3)" in str(recwarn.pop(UserWarning).message)
    near(added(iso_c, [0 * change, 0 * change]), 0 * change)  # nothing was trained, and nothing is said
    assert not recwarn.list


@few
@given(seeds)
def test_a_row_that_no_source_moved_stays(seed):
    changes = random(seed, 3, 8, 3)
    for change in changes:
        change[5] = 0
    assert added(iso_c, changes)[5].abs().max() < 1e-12


# ---------------------------------------------------------------- TSV-M


def tsv_m_in_numpy(changes):
    keep = min(changes[0].shape) // len(changes)
    parts = [np.linalg.svd(change, full_matrices=False) for change in changes]
    a = np.hstack([u[:, :keep] for u, _, _ in parts])
    b = np.hstack([vt[:keep].T for _, _, vt in parts])
    sigma = np.concatenate([s[:keep] for _, s, _ in parts])

    def whitened(x):  # by the eigenvalues of x^T x, in place of the SVD
        values, vectors = np.linalg.eigh(x.T @ x)
        return x @ vectors @ np.diag(values**-0.5) @ vectors.T

    return whitened(a) @ np.diag(sigma) @ whitened(b).T


def test_tsv_m_worked_by_hand():
    near(added(tsv_m, [[[2, 0], [0, 0.5]], [[1, 1], [1, 1]]]), 2 * np.eye(2))
    near(added(tsv_m, TALL), [[2.1423, 0.6086], [-0.5465, 1.9239], [0.5057, 0.1437]], 1e-4)
    near(added(tsv_m, [[[2, 0], [0, 0.5]], [[0.1, 0], [0, 3]]]), np.diag([2.0, 3.0]))
    near(added(tsv_m, [[1, 2], [3, 0]], scale=1.5), [3, 1.5])


@few
@given(seeds, st.integers(1, 3), sizes, sizes)
def test_tsv_m_whitens_the_first_singular_vectors(seed, number, rows, columns):
    changes = random(seed, number, rows, columns)
    near(added(tsv_m, changes, scale=0.7), 0.7 * tsv_m_in_numpy(changes), 1e-7)


@few
@given(seeds, sizes, sizes)
def test_tsv_m_of_one_source_is_that_source(seed, rows, columns):
    (change,) = random(seed, 1, rows, columns)
    near(added(tsv_m, [change]), change)


@few
@given(seeds)
def test_tsv_m_adds_orthogonal_sources_up(seed):
    left, right = (np.linalg.qr(matrix)[0] for matrix in random(seed, 2, 7, 7))
    parts = [left[:, start : start + 2] @ np.diag([3.0, 1.5]) @ right[:, start : start + 2].T for start in (0, 2, 4)]
    near(added(tsv_m, parts), sum(parts))


def test_tsv_m_of_more_sources_than_rows_adds_nothing():
    near(added(tsv_m, random(0, 3, 2, 5)), np.zeros((2, 5)))


def test_a_source_that_moved_nothing_is_as_if_its_share_were_empty():
    """The singular vectors of a zero matrix are the routine's choice; they turn nobody else's."""
    one, two = random(3, 2, 6, 6)
    u, s, vt = np.linalg.svd(one)
    near(added(tsv_m, [one, 0 * one, 0 * one]), u[:, :2] * s[:2] @ vt[:2])
    assert added(tsv_m, [0 * one, 0 * two]).abs().max() == 0


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("method", [iso_c, tsv_m])
@few
@given(seeds, st.floats(0.1, 10))
def test_order_does_not_matter_and_size_carries_over(method, seed, factor):
    changes = random(seed, 3, 9, 7)
    near(added(method, changes), added(method, changes[::-1]))
    near(added(method, [factor * change for change in changes]), factor * added(method, changes), 1e-8)
    near(added(method, [change.T for change in changes]), added(method, changes).T)


@pytest.mark.parametrize("method", [iso_c, tsv_m])
def test_embeddings_biases_and_routers_are_averaged_unless_asked(method):
    changes = random(1, 3, 8, 6)
    mean = sum(changes) / 3
    averaged = (
        "shared.weight", "decoder.embed_tokens.weight", "lm_head.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.1.layer.1.mlp.router.classifier.weight",
    )  # fmt: skip
    for name in averaged:
        near(added(method, changes, name=name, averaged=AVERAGED.default), mean)
        assert not torch.allclose(added(method, changes, name=name), torch.as_tensor(mean))
    merged = (
        "decoder.block.0.layer.1.EncDecAttention.q.weight", "encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight",
        "encoder.block.0.layer.1.mlp.wo.weight",
    )  # fmt: skip
    for name in merged:
        near(added(method, changes, name=name, averaged=AVERAGED.default), added(method, changes))
    near(added(method, random(1, 3, 2, 3, 4)), sum(random(1, 3, 2, 3, 4)) / 3)  # no matrix


@pytest.mark.parametrize("method", [iso_c, tsv_m])
def test_float32_and_weights_that_are_no_numbers(method):
    changes = [torch.as_tensor(change) for change in random(2, 3, 8, 6)]
    base = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    single = dict(method({"w": base}, [{"w": base + change.float()} for change in changes]))["w"]
    assert single.dtype == torch.float32
    near(single - base, added(method, changes), 1e-5)
    with pytest.raises(ValueError, match="w has entries that are no finite numbers"):
        added(method, [changes[0], changes[1] * float("nan")])


# ---------------------------------------------------------------- fusion-bench


def alone(path, monkeypatch):
    for name in ("fusion_bench.utils", "fusion_bench.utils.type"):
        monkeypatch.setitem(sys.modules, name, MagicMock())  # timers, and names of types
    return fusion_bench_file(path, monkeypatch)


def few_tensors(seed):
    """(a base of zeros, three task vectors): two matrices and a vector."""
    matrices = zip(random(seed, 3, 9, 7), random(seed + 1, 3, 8, 6), strict=True)
    vectors = [{"m": torch.as_tensor(m), "router": torch.as_tensor(r), "v": torch.as_tensor(r[0])} for m, r in matrices]
    return {name: torch.zeros_like(tensor) for name, tensor in vectors[0].items()}, vectors


def test_iso_c_is_fusion_benchs(monkeypatch):
    theirs = alone("method/isotropic_merging/iso_utils.py", monkeypatch)
    for seed in range(10):
        base, vectors = few_tensors(seed)
        wanted = theirs.iso_c(vectors, accelerator="cpu", exclude_keys=["router"])
        merged = dict(iso_c(base, vectors, averaged=("router",)))
        for name in base:
            near(merged[name], wanted[name])


def test_tsv_m_is_fusion_benchs(monkeypatch):
    theirs = alone("method/task_singular_vector/utils/TSVM_utils.py", monkeypatch)
    for seed in range(10):
        base, vectors = few_tensors(seed)
        wanted = theirs.compute_and_sum_svd_mem_reduction(vectors, exclude_keys=["router"], accelerator="cpu")
        merged = dict(tsv_m(base, vectors, averaged=("router",)))
        for name in base:
            near(merged[name], wanted[name])
