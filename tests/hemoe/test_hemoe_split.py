"""Splits of neurons into experts, every method that makes them, and their files."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import sparsity

from expert_merging.core.errors import UserError
from expert_merging.hemoe.clusters import balanced_clusters
from expert_merging.hemoe.importance import processed
from expert_merging.hemoe.partition import METHODS, Settings, partition
from expert_merging.hemoe.solver import objective
from expert_merging.hemoe.split import Split, experts_from_labels


def raw_scores(depth=2, neurons=96, domains=4, seed=0):
    """Log-normal scores with a part that all domains share."""
    random = np.random.default_rng(seed)
    shared = random.standard_normal((depth, neurons, 1))
    return np.exp(0.8 * shared + 0.6 * random.standard_normal((depth, neurons, domains)))


def gates(depth=2, neurons=96, width=12, seed=0):
    return list(np.random.default_rng(seed).standard_normal((depth, neurons, width)).astype(np.float32))


@pytest.fixture(scope="module")
def splits():
    """One of each method, over the same scores."""
    made = {}
    for method in METHODS:
        like = made.get("HEMoE")
        made[method] = partition(
            method, Settings(experts=4), raw_scores(), gates(), like, layers=(3, 5), domains=tuple("abcd")
        )
    return made


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith("MoEBERT")])
def test_every_neuron_has_one_expert(splits, method):
    split = splits[method]
    for layer in split.experts:
        assert sorted(np.concatenate(layer)) == list(range(96))
        assert all((np.diff(expert) > 0).all() for expert in layer)
    assert split.is_partition() and not split.left_out().any() and not split.repeated().any()
    for labels, layer in zip(split.labels, split.experts, strict=True):
        again = experts_from_labels(labels, 4)
        assert all((a == b).all() for a, b in zip(again, layer, strict=True))


def test_sizes(splits):
    for method in ("MoEfication", "EMoE", "random"):
        assert (splits[method].sizes == 24).all()
    hemoe = splits["HEMoE"].sizes
    assert (hemoe >= 12).all() and (hemoe <= 48).all() and len(set(hemoe[0])) > 1
    assert (splits["random_heterogeneous"].sizes == hemoe).all()
    assert (splits["random_heterogeneous"].labels != splits["HEMoE"].labels).any()


def test_hemoe_keeps_its_promises(splits):
    split = splits["HEMoE"]
    assert split.serves.shape == (2, 4, 4) and split.domains == tuple("abcd")
    assert (split.serves.sum(2) >= 1).all() and (split.serves.sum(1) <= 2).all()
    weights = processed(raw_scores())
    for layer in range(2):
        assert objective(weights[layer], split.labels[layer], split.serves[layer]) == pytest.approx(
            split.objective[layer]
        )
    assert (split.bound >= split.objective).all() and (split.gap >= 0).all()
    assert set(split.status) <= {"optimal", "bounded"}


def test_scores_of_some_layers_are_weighed_as_among_all():
    """Domains keep the weight that they have over the whole model, of which a mixture may leave layers dense."""
    scores = raw_scores(depth=3)
    scores[0, :, 1] *= 50  # the layer that stays dense holds most of domain 1
    split = partition("HEMoE", Settings(experts=4), scores[1:], among=scores)
    among_all = processed(scores)[1:]
    for weights, labels, serves, found in zip(among_all, split.labels, split.serves, split.objective, strict=True):
        assert objective(weights, labels, serves) == pytest.approx(found)
    alone = partition("HEMoE", Settings(experts=4), scores[1:])
    assert alone.objective != pytest.approx(split.objective)


def test_modules_stay_together():
    rows = gates()
    split = partition("HEMoE", Settings(experts=4, modules=12), raw_scores(), rows)
    for gate, labels in zip(rows, split.labels, strict=True):
        modules = balanced_clusters(gate, 12, seed=42)
        assert (np.bincount(modules) == 8).all()
        assert all(len(set(labels[modules == module])) == 1 for module in range(12))
    alone = partition("HEMoE", Settings(experts=4), raw_scores(), rows)
    assert (alone.objective >= split.objective).all()


def test_moebert_counts_at_full_size():
    scores = raw_scores(depth=1, neurons=8192, domains=8)
    split = partition("MoEBERT", Settings(experts=8), scores)
    assert (split.sizes == 1024).all() and split.repeated() == [512] and split.left_out() == [3584]
    total = scores[0].sum(1)
    everywhere = np.flatnonzero(split._times(split.experts[0]) == 8)
    assert set(everywhere) == set(np.argsort(-total)[:512])

    by_domain = partition("MoEBERT_domains", Settings(experts=8), scores)
    assert (by_domain.sizes == 1024).all()
    for domain, expert in enumerate(by_domain.experts[0]):
        assert scores[0, expert, domain].min() >= np.delete(scores[0, :, domain], expert).max()
    assert (by_domain.serves[0] == np.eye(8)).all()
    with pytest.raises(ValueError, match="no labels"):
        _ = split.labels


def test_clusters_find_groups_of_equal_size():
    random = np.random.default_rng(0)
    centres = random.standard_normal((5, 20))
    truth = random.permutation(np.repeat(np.arange(5), 30))
    found = balanced_clusters(centres[truth] + 0.05 * random.standard_normal((150, 20)), 5, seed=1)
    assert len(set(zip(truth, found, strict=True))) == 5
    assert sorted(np.bincount(balanced_clusters(random.standard_normal((23, 4)), 5, seed=0))) == [4, 4, 5, 5, 5]


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 12))
@settings(max_examples=30)
def test_files_round_trip(tmp_path_factory, seed, depth, n, neurons):
    """Also neurons in several experts and in none, and experts with no neuron."""
    folder = tmp_path_factory.mktemp("split")
    random = np.random.default_rng(seed)
    layers = tuple(sorted(random.choice(20, depth, replace=False).tolist()))
    experts = [[np.flatnonzero(random.random(neurons) < 0.4) for _ in range(n)] for _ in range(depth)]
    objectives = np.where(random.random(depth) < 0.5, np.nan, random.random(depth))
    split = Split(
        "anything", neurons, layers, experts, serves=random.random((depth, n, 3)) < 0.5, domains=("x", "y", "z"),
        objective=objectives, settings={"ratio": 4.0},
    )  # fmt: skip
    split.save(folder / "split.npz")
    split.export_parts(folder / "parts")
    loaded, imported = Split.load(folder / "split.npz"), Split.import_parts(folder / "parts", "anything")
    assert loaded.record() == split.record() and (loaded.serves == split.serves).all()
    for other in (loaded, imported):
        assert other.layers == layers and other.neurons == neurons
        for mine, its in zip(split.experts, other.experts, strict=True):
            assert all((a == b).all() and len(a) == len(b) for a, b in zip(mine, its, strict=True))


def test_reads_the_released_form(tmp_path):
    (tmp_path / "7.part.3").write_text("0\n2\n\n0,2\n1\n")
    split = Split.import_parts(tmp_path, "released")
    assert split.layers == (7,) and split.neurons == 5
    assert [expert.tolist() for expert in split.experts[0]] == [[0, 3], [4], [1, 3]]
    assert split.left_out() == [1] and split.repeated() == [1]
    (tmp_path / "8.part.3").write_text("0\n3\n")
    with pytest.raises(UserError, match="line 2: '3' is not an expert"):
        Split.import_parts(tmp_path, "released")
    with pytest.raises(UserError, match="layer 9"):
        Split.import_parts(tmp_path, "released", layers=[9])
    (tmp_path / "8.part.3").write_text("0\n1\n")
    with pytest.raises(UserError, match="different numbers"):
        Split.import_parts(tmp_path, "released")
    (tmp_path / "split.npz").write_text("not")
    with pytest.raises(UserError, match="not a split"):
        Split.load(tmp_path / "split.npz")


def test_same_seed_same_split_and_others_differ():
    same = [partition("random", Settings(experts=4, seed=s), raw_scores()).labels for s in (1, 1, 2)]
    assert (same[0] == same[1]).all() and (same[0] != same[2]).any()
    assert (same[0][0] != same[0][1]).any(), "the layers must not repeat one another"
    twice = [partition("HEMoE", Settings(experts=4), raw_scores(depth=1)) for _ in range(2)]
    assert (twice[0].labels == twice[1].labels).all() and twice[0].objective == twice[1].objective


def test_what_is_missing_or_cannot_be():
    def refuses(words, method, **changes):
        with pytest.raises(UserError, match=words):
            partition(method, Settings(**{"experts": 4, **changes}), raw_scores(1))

    refuses("no partition is called 'hemo'", "hemo")
    refuses("needs the weights W_gate", "MoEfication")
    refuses("needs the weights W_gate", "HEMoE", modules=12)
    refuses("needs another split", "random_heterogeneous")
    refuses("3 experts do not fit 4 domains", "MoEBERT_domains", experts=3)
    refuses("97 experts", "random", experts=97)
    refuses("ratio is 0.5", "HEMoE", ratio=0.5)
    refuses("solver is 'cplex'", "HEMoE", solver="cplex")
    with pytest.raises(UserError, match="96 neurons do not make 7 modules"):
        partition("HEMoE", Settings(experts=4, modules=7), raw_scores(1), gates(1))
    with pytest.raises(UserError, match="the same everywhere"):
        partition("HEMoE", Settings(experts=4, modules=12), raw_scores(1), gates(2))


def test_recorded_sparsity():
    """The authors' records for LLaMA-3.2-1B, layers 3..14: eight equal experts, then their heterogeneous ones on ARC-easy."""
    everything, in_experts = 1_235_814_400, 12 * 3 * 2048 * 8192
    equal = [f"{sparsity(k / 8, in_experts, everything):.5f}" for k in range(1, 8)]
    assert equal == ["0.57236", "0.63345", "0.69454", "0.75563", "0.81673", "0.87782", "0.93891"]
    shares = (0.113, 0.199, 0.307, 0.406, 0.499, 0.593, 0.772)
    recorded = (0.56638, 0.60859, 0.66142, 0.70978, 0.75489, 0.80095, 0.88844)
    for share, record in zip(shares, recorded, strict=True):
        assert sparsity(share, in_experts, everything) == pytest.approx(record, abs=0.001 * in_experts / everything)
    assert sparsity(1, in_experts, everything) == 1
