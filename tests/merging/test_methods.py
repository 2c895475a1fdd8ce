"""The merging methods on named tensors: their formulas, what they leave alone, and fusion-bench's numbers."""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from expert_merging.core.safetensors_folder import SafetensorsFolder, write_tensors
from expert_merging.merging.adamerging import AdaMerged
from expert_merging.merging.dare import dropped
from expert_merging.merging.fisher import diagonal_fisher, fisher
from expert_merging.merging.named import added, task_vectors
from expert_merging.merging.registry import METHODS
from expert_merging.merging.regmean import gram_matrices, regmean
from expert_merging.merging.ties import elected_task_vectors, kth_magnitude

SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 5), "c": (7,)}
seeds = st.integers(0, 10_000)
few = settings(max_examples=25)


def state(seed, like=None, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    made = {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: made[name] + (like[name] if like else 0) for name in made}


def world(seed, models=3):
    """(base, fine-tuned models not far from it)."""
    base = state(seed)
    return base, [state(seed + 1 + i, base, 0.1) for i in range(models)]


def statistics(models, seed=0):
    """Made-up Fisher information and Gram matrices of each model."""
    fishers = [{name: tensor.square() for name, tensor in state(seed + 50 + i).items()} for i in range(len(models))]
    inputs = [torch.randn(20, 3, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(models))]
    return fishers, [{"a": x.T @ x / len(x)} for x in inputs]


def run(name, base, models, **settings):
    if name == "fisher":
        settings["information"] = statistics(models)[0]
    if name == "regmean":
        settings["grams"] = statistics(models)[1]
    if name.startswith("adamerging"):
        settings["coefficients"] = [0.3] * len(models)
    return dict(FUNCTIONS[name](base, models, **settings))


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in SHAPES])


def close(a, b, tolerance=1e-6):
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def adamerging(base, models, coefficients, keep=None):
    """theta_0 + sum_i c_i tau_i, what `AdaMerged` holds; coefficients are one a model, or {name: one a model}."""
    vectors = task_vectors(base, models)
    if keep is not None:
        vectors = elected_task_vectors(vectors, keep)

    def change(name):
        own = coefficients[name] if isinstance(coefficients, dict) else coefficients
        return sum(float(c) * vector[name] for c, vector in zip(own, vectors, strict=True))

    return added(base, change)


def adamerging_plus(base, models, coefficients, keep=0.2):
    return adamerging(base, models, coefficients, keep)


# Every function of the registry, by its own name, and AdaMerging with given coefficients.
FUNCTIONS = {method.load().__name__: method.load() for method in METHODS.values() if method.function}
FUNCTIONS |= {"adamerging": adamerging, "adamerging_plus": adamerging_plus}
ALL = sorted(FUNCTIONS)


# ---------------------------------------------------------------- formulas


@few
@given(seeds, st.integers(1, 5))
def test_task_arithmetic_at_one_over_t_is_the_average(seed, number):
    """Invariant 16 of WEMoE's, with the tests of DARE, AdaMerging and fusion-bench below."""
    base, models = world(seed, number)
    close(run("task_arithmetic", base, models, scale=1 / number), run("simple_average", base, models))


@few
@given(seeds)
def test_nothing_added_is_the_base_and_one_model_is_itself(seed):
    base, models = world(seed, 1)
    for name in ("task_arithmetic", "ties", "dare_task_arithmetic", "dare_ties"):
        assert all(torch.equal(run(name, base, models, scale=0.0)[n], base[n]) for n in base)
    close(run("task_arithmetic", base, models, scale=1.0), models[0])
    close(run("ties", base, models, scale=1.0, keep=1.0), models[0])
    for name in ("simple_average", "fisher", "regmean"):
        close(run(name, base, models), models[0], 1e-5)


@few
@given(seeds, st.sampled_from(("mean", "sum")), st.floats(0.01, 1.0))
def test_ties_is_trim_elect_merge_on_the_whole_vector(seed, merge, keep):
    base, models = world(seed)
    vectors = torch.stack([flat(model) - flat(base) for model in models])
    k = vectors.shape[1] - int(vectors.shape[1] * keep)
    if k:
        vectors = vectors * (vectors.abs() >= vectors.abs().kthvalue(k, dim=1, keepdim=True).values)
    sign = vectors.sum(0).sign()
    majority = sign.sum()
    sign = torch.where(sign == 0, 1.0 if majority > 0 else -1.0, sign)
    kept = torch.where(vectors * sign > 0, vectors, 0)
    change = kept.sum(0) / ((kept != 0).sum(0).clamp(min=1) if merge == "mean" else 1)
    merged = run("ties", base, models, scale=0.7, keep=keep, merge=merge)
    torch.testing.assert_close(flat(merged), flat(base) + 0.7 * change, rtol=1e-6, atol=1e-6)


@few
@given(seeds, st.integers(1, 33))
def test_the_kth_magnitude_is_exact(seed, k):
    for dtype in (torch.float32, torch.float64):
        tensors = [
            x.to(dtype).mul(8).round() / 8 if seed % 2 else x.to(dtype) for x in state(seed).values()
        ]  # with equals
        wanted = torch.cat([x.flatten() for x in tensors]).abs().kthvalue(k).values
        assert kth_magnitude(tensors, k) == wanted.item()


def test_ties_keeps_the_share_of_the_whole_model_and_one_more():
    base, models = world(3, 1)
    base = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    merged = flat(run("ties", base, models, scale=1.0, keep=0.2))
    assert (merged != 0).sum() == int(0.2 * len(merged)) + 1


@few
@given(seeds)
def test_dare_without_dropping_is_what_it_builds_on(seed):
    base, models = world(seed)
    close(run("dare_task_arithmetic", base, models, drop=0.0), run("task_arithmetic", base, models))
    close(run("dare_ties", base, models, drop=0.0), run("ties", base, models))


def test_dare_keeps_the_task_vector_on_average():
    base, (model,) = world(1, 1)
    vector = task_vectors(base, [model])
    total = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    number = 10_000
    for seed in range(number):
        one = dropped(base, vector, 0.5, seed)[0]
        for name in ("a.bias", "c"):
            total[name] += one[name]
    for name in ("a.bias", "c"):
        error = (total[name] / number - vector[0][name]) / vector[0][name].abs()
        assert error.abs().max() < 5 / number**0.5  # an entry's relative deviation is 1 / sqrt(number)


@few
@given(seeds, st.floats(0.05, 0.9))
def test_dare_drops_or_scales_and_is_seeded(seed, drop):
    base, models = world(seed)
    vectors = task_vectors(base, models)
    once, twice, other = (dropped(base, vectors, drop, s) for s in (seed, seed, seed + 1))
    for i, vector in enumerate(vectors):
        for name in reversed(list(base)):  # in any order, the same
            assert torch.equal(once[i][name], twice[i][name])
            kept = once[i][name] != 0
            torch.testing.assert_close(once[i][name][kept], vector[name][kept] / (1 - drop))
    assert any(not torch.equal(once[i][n], other[i][n]) for i in range(3) for n in base)


@few
@given(seeds)
def test_fisher_weighs_entries_by_their_information(seed):
    base, models = world(seed)
    same = [{name: torch.full_like(tensor, 2.0) for name, tensor in base.items()}] * 3
    close(dict(fisher(base, models, same)), run("simple_average", base, models))
    sure = [{**same[0], "c": torch.full((7,), 1e4 if i == 1 else 0.0)} for i in range(3)]
    merged = dict(fisher(base, models, sure))
    torch.testing.assert_close(merged["c"], models[1]["c"], rtol=1e-3, atol=1e-3)
    without = [{name: tensor for name, tensor in one.items() if name != "a.bias"} for one in same]
    close(dict(fisher(base, models, without)), run("simple_average", base, models))


def test_a_model_of_large_gradients_does_not_outweigh_another():
    """Its information is divided by its norm over the whole model: a hundred times as much everywhere changes nothing."""
    base, models = world(0)
    even = [{name: torch.full_like(tensor, size) for name, tensor in base.items()} for size in (1.0, 100.0, 5.0)]
    close(dict(fisher(base, models, even, floor=0.0)), run("simple_average", base, models))


def test_regmeans_default_takes_six_tenths_off_the_diagonal():
    """By hand, for two inputs of one output."""
    base, models = (
        {"a.weight": torch.zeros(1, 2)},
        [{"a.weight": torch.tensor([[1.0, 0.0]])}, {"a.weight": torch.tensor([[0.0, 1.0]])}],
    )
    grams = [{"a": torch.tensor([[2.0, 1.0], [1.0, 1.0]])}, {"a": torch.tensor([[1.0, 0.0], [0.0, 3.0]])}]
    # sum G W = [[2, 0.6], [0.6, 1]] [1, 0] + [[1, 0], [0, 3]] [0, 1] = [2, 3.6]; sum G = [[3, 0.6], [0.6, 4]].
    wanted = torch.linalg.solve(torch.tensor([[3.0, 0.6], [0.6, 4.0]]), torch.tensor([2.0, 3.6]))
    close(dict(regmean(base, models, grams, ridge=0.0)), {"a.weight": wanted[None]})


def test_diagonal_fisher_squares_the_gradient_of_a_batch():
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    x = torch.randn(6, 3)
    found = diagonal_fisher(model, [x[:4], x[4:]], lambda m, batch: (m(batch), len(batch)))
    wanted = torch.zeros_like(model.weight)
    for batch in (x[:4], x[4:]):
        p = model(batch).softmax(-1).detach()
        # d/dz_k of sum_c sqrt(p_c) log p_c with sqrt(p_c) constant: sqrt(p_k) - p_k sum_c sqrt(p_c)
        wanted += ((p.sqrt() - p * p.sqrt().sum(-1, keepdim=True)).T @ batch).square() / 6
    torch.testing.assert_close(found["weight"], wanted)
    assert all(parameter.grad is None for parameter in model.parameters())


@few
@given(seeds)
def test_regmean_is_the_least_squares_solution(seed):
    base, models = world(seed)
    inputs = [torch.randn(40, 3, generator=torch.Generator().manual_seed(seed + i)).double() for i in range(3)]
    grams = [{"a": x.T @ x / len(x)} for x in inputs]
    merged = dict(regmean(base, models, grams, off_diagonal=1.0, ridge=0.0))
    targets = torch.cat([x @ model["a.weight"].double().T for x, model in zip(inputs, models, strict=True)])
    solution = torch.linalg.lstsq(torch.cat(inputs), targets).solution.T.float()
    torch.testing.assert_close(merged["a.weight"], solution, rtol=1e-4, atol=1e-5)
    for name in ("a.bias", "b.weight", "c"):
        torch.testing.assert_close(merged[name], run("simple_average", base, models)[name])


@few
@given(seeds)
def test_regmean_averages_where_no_input_lies(seed):
    base, models = world(seed)
    average = run("simple_average", base, models)["a.weight"]
    unseen = [{"a": torch.zeros(3, 3)}] * 3
    torch.testing.assert_close(dict(regmean(base, models, unseen))["a.weight"], average)
    silent = [{"a": torch.diag(torch.tensor([1.0 + i, 2.0, 0.0]))} for i in range(3)]  # the third input is always 0
    merged = dict(regmean(base, models, silent))["a.weight"]
    torch.testing.assert_close(merged[:, 2], average[:, 2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged[:, 0], average[:, 0], atol=1e-4)
    for name in ("a.weight",):
        identical = dict(regmean(base, [models[0]] * 3, statistics(models)[1]))[name]
        torch.testing.assert_close(identical, models[0][name], rtol=1e-4, atol=1e-5)


def test_gram_matrices_are_of_each_layers_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(2, 5, 3)
    grams = gram_matrices(model, [x[:1], x[1:]], lambda m, batch: m(batch))
    hidden = model[1](model[0](x)).flatten(0, 1)
    torch.testing.assert_close(grams["0"], x.flatten(0, 1).T @ x.flatten(0, 1) / 10)
    torch.testing.assert_close(grams["2"], hidden.T @ hidden / 10)
    assert not model[0]._forward_pre_hooks


@few
@given(seeds, st.floats(-1, 1))
def test_adamerging_with_one_coefficient_is_task_arithmetic(seed, scale):
    base, models = world(seed)
    wanted = run("task_arithmetic", base, models, scale=scale)
    close(dict(adamerging(base, models, [scale] * 3)), wanted)
    close(dict(adamerging(base, models, {name: [scale] * 3 for name in base})), wanted)
    plus = dict(adamerging_plus(base, models, [scale] * 3, keep=0.3))
    close(plus, run("ties", base, models, scale=scale, keep=0.3, merge="sum"))


@few
@given(seeds)
def test_elected_task_vectors_agree_in_sign(seed):
    base, models = world(seed)
    elected = elected_task_vectors(task_vectors(base, models), 0.5)
    for name in base:
        together = torch.stack([vector[name] for vector in elected])
        assert ((together >= 0).all(0) | (together <= 0).all(0)).all()


class Small(nn.Module):
    """Two layers that share a matrix, one of them under two names, and a counter."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.same = self.first
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x):
        return self.second(self.first(x).relu())


FILE = ("first.weight", "first.bias", "steps")  # a file holds tied tensors once


@pytest.mark.parametrize("layer_wise", [True, False])
@pytest.mark.parametrize("keep", [None, 0.4])
def test_a_model_with_coefficients_is_the_merged_model(layer_wise, keep):
    base, tuned = Small(), [Small(1), Small(2)]
    states = [{n: t for n, t in model.state_dict().items() if n in FILE} for model in tuned]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    learning = AdaMerged(base, states, layer_wise, keep)
    with torch.no_grad():
        learning.coefficients += torch.linspace(-0.2, 0.2, learning.coefficients.numel()).view_as(learning.coefficients)
    x = torch.randn(3, 4)
    learning(x).sum().backward()
    assert learning.model.same is learning.model.first and learning.model.second.weight is learning.model.first.weight
    assert [name for name, p in learning.named_parameters() if p.grad is not None] == ["coefficients"]
    assert (learning.coefficients.grad != 0).all()
    method = adamerging if keep is None else adamerging_plus
    own = {name: tensor for name, tensor in before.items() if name in FILE}
    merged = Small(5)
    merged.load_state_dict(
        dict(method(own, states, learning.learnt(), **({} if keep is None else {"keep": keep}))), strict=False
    )
    torch.testing.assert_close(learning(x), merged(x))
    torch.testing.assert_close(learning.merged(Small(6))(x), merged(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


# ---------------------------------------------------------------- what all methods have in common


@pytest.mark.parametrize("name", ALL)
def test_what_is_given_stays_as_it_is(name):
    base, models = world(5)
    before = [{n: t.clone() for n, t in one.items()} for one in (base, *models)]
    merged = run(name, base, models)
    for tensor in merged.values():
        tensor.zero_()
    for one, copy in zip((base, *models), before, strict=True):
        assert all(torch.equal(one[n], copy[n]) for n in copy)


@pytest.mark.parametrize("name", ALL)
def test_half_precision_integers_and_ties(name):
    base, models = world(6)
    for number, one in enumerate((base, *models)):
        for tensor in list(one):
            one[tensor] = one[tensor].bfloat16()
        one["again"], one["positions"] = one["b.weight"], torch.tensor([3, 1, 2]) + 0 * number
    merged = run(name, base, models)
    assert set(merged) == set(base) and all(merged[n].dtype == base[n].dtype for n in base)
    assert torch.equal(merged["positions"], base["positions"])
    assert torch.equal(merged["again"], merged["b.weight"])
    once = [{n: t for n, t in one.items() if n != "again"} for one in (base, *models)]
    again = run(name, once[0], once[1:])  # a tied tensor does not count twice, in the share that TIES keeps, say
    assert all(torch.equal(merged[n], again[n]) for n in again)


@pytest.mark.parametrize("name", ALL)
def test_folders_give_what_state_dicts_give_tensor_by_tensor(name, tmp_path):
    base, models = world(7)
    folders = []
    for number, one in enumerate((base, *models)):
        (tmp_path / str(number)).mkdir()
        write_tensors(one.items(), tmp_path / str(number))
        folders.append(SafetensorsFolder(tmp_path / str(number)))
    merged = run(name, folders[0], folders[1:])
    wanted = run(name, {n: base[n] for n in folders[0]}, models)  # files are in the order of names
    assert all(torch.equal(merged[n], wanted[n]) for n in wanted)
    (tmp_path / "merged").mkdir()
    write_tensors(merged.items(), tmp_path / "merged")
    assert all(torch.equal(SafetensorsFolder(tmp_path / "merged")[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize(
    "name", ["simple_average", "task_arithmetic", "iso_c", "tsv_m", "adamerging", "fisher", "regmean"]
)
def test_a_tensor_is_read_when_it_is_asked_for(name):
    base, models = world(8)

    class Read(dict):
        """Notes what is asked for; not a plain state dict, so that nothing is looked at to find ties."""

        def __init__(self, tensors):
            super().__init__(tensors)
            self.read = []

        def __getitem__(self, key):
            self.read.append(key)
            return super().__getitem__(key)

    seen = [Read(model) for model in models]
    settings = {"fisher": {"information": statistics(models)[0]}, "regmean": {"grams": statistics(models)[1]}}
    settings = settings.get(name, {"coefficients": [0.3] * 3} if name == "adamerging" else {})
    stream = FUNCTIONS[name](base, seen, **settings)
    for one in seen:
        one.read.clear()  # looking for ties
    first, _ = next(iter(stream))
    assert all(set(one.read) == {first} for one in seen)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("ties", {"keep": 0.0}, "keep is 0.0"),
        ("ties", {"keep": 1.5}, "keep is 1.5"),
        ("ties", {"merge": "max"}, "must be mean or sum"),
        ("dare_ties", {"drop": 1.0}, "drop is 1.0"),
        ("dare_task_arithmetic", {"drop": -0.1}, "drop is -0.1"),
        ("fisher", {"information": []}, "3 models and 0 Fisher"),
        ("regmean", {"grams": []}, "3 models and 0 sets"),
    ],
)
def test_settings_that_make_no_sense(name, settings, said):
    base, models = world(9)
    with pytest.raises(ValueError, match=said):
        dict(FUNCTIONS[name](base, models, **settings))


@pytest.mark.parametrize("name", [name for name in ALL if name != "simple_average"])
def test_models_that_do_not_fit(name):
    base, models = world(10)
    with pytest.raises(ValueError, match="no model"):
        run(name, base, [])
    with pytest.raises(ValueError, match="only one of them has c"):
        run(name, base, [models[0], {n: t for n, t in models[1].items() if n != "c"}])
    with pytest.raises(ValueError, match=r"c is \(7,\) in the base model and \(8,\) in model 1"):
        run(name, base, [models[0], {**models[1], "c": torch.zeros(8)}])


# ---------------------------------------------------------------- fusion-bench


def fusion_bench_file(path, monkeypatch):
    """A module of fusion-bench by itself: its packages import what an installation without its dependencies lacks."""
    found = PathFinder.find_spec("fusion_bench")
    if found is None:
        pytest.skip("fusion-bench is not installed (make test-peers)")
    for name in ("theirs", "theirs.utils", *(f"fusion_bench.{part}" for part in ("method", "mixins", "modelpool"))):
        monkeypatch.setitem(sys.modules, name, MagicMock())  # of which the functions under test use nothing
    sys.modules["fusion_bench.method"].BaseAlgorithm = type("Base", (), {})
    sys.modules["fusion_bench.mixins"].SimpleProfilerMixin = type("Mixin", (), {})
    spec = importlib.util.spec_from_file_location("theirs.module", Path(found.origin).parent / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sorted_flat(tensors):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("merge", ["mean", "sum"])
@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_ties_is_fusion_benchs(merge, keep, monkeypatch):
    theirs = fusion_bench_file("method/ties_merging/ties_merging_utils.py", monkeypatch)
    for seed in range(20):
        base, models = world(seed)
        vectors = torch.vstack([theirs.state_dict_to_vector(m) - theirs.state_dict_to_vector(base) for m in models])
        change = theirs.ties_merging(vectors, reset_thresh=keep, merge_func=merge)
        merged = run("ties", base, models, scale=0.3, keep=keep, merge=merge)
        torch.testing.assert_close(sorted_flat(merged), sorted_flat(base) + 0.3 * change, rtol=1e-6, atol=1e-6)
        split, _ = theirs.ties_merging_split(vectors, reset_thresh=keep, merge_func="sum")
        elected = elected_task_vectors(task_vectors(base, models), keep)
        ours = torch.stack([sorted_flat(vector) for vector in elected])
        torch.testing.assert_close(ours, split, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_dare_is_fusion_benchs_with_the_same_seed(ties, monkeypatch):
    theirs = fusion_bench_file("method/dare/utils.py", monkeypatch)
    on_ties = fusion_bench_file("method/ties_merging/ties_merging_utils.py", monkeypatch)
    for seed in range(20):
        base, models = world(seed)
        vectors = [{n: nn.Parameter(m[n] - base[n]) for n in base} for m in models]
        torch.manual_seed(seed)
        for vector in vectors:
            theirs.module_random_drop_(vector, 0.4, rescale=True)
        rows = torch.vstack([on_ties.state_dict_to_vector(v) for v in vectors]).detach()
        change = on_ties.ties_merging(rows, reset_thresh=0.3, merge_func="sum") if ties else rows.sum(0)
        more = {"keep": 0.3, "merge": "sum"} if ties else {}
        merged = run(
            "dare_ties" if ties else "dare_task_arithmetic", base, models, scale=0.3, drop=0.4, seed=seed, **more
        )
        torch.testing.assert_close(sorted_flat(merged), sorted_flat(base) + 0.3 * change, rtol=1e-6, atol=1e-6)


def test_averages_and_task_arithmetic_are_fusion_benchs():
    theirs = pytest.importorskip("fusion_bench.utils.state_dict_arithmetic", reason="fusion-bench is not installed")
    for seed in range(20):
        base, models = world(seed)
        close(run("simple_average", base, models), dict(theirs.state_dict_avg(models)))
        total = theirs.state_dict_sum([theirs.state_dict_sub(model, base) for model in models])
        wanted = theirs.state_dict_add(base, theirs.state_dict_mul(total, 0.3))
        close(run("task_arithmetic", base, models, scale=0.3), dict(wanted))


def test_adamerging_is_fusion_benchs():
    wrapper = pytest.importorskip(
        "fusion_bench.models.wrappers.layer_wise_fusion", reason="fusion-bench is not installed"
    )
    tasks = pytest.importorskip("fusion_bench.models.wrappers.task_wise_fusion")

    def network(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    base, tuned, x = network(0), [network(1), network(2)], torch.randn(3, 4)
    coefficients = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.5, 0.0]])
    ours = AdaMerged(network(0), [model.state_dict() for model in tuned])
    with torch.no_grad():
        ours.coefficients.copy_(coefficients)
    theirs = wrapper.LayerWiseMergedModel(coefficients, network(0), [network(1), network(2)], clamp_weights=False)
    theirs.merge_weights()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    both = tasks.TaskWiseMergedModel(
        torch.tensor([0.2, 0.6]), network(0), [network(1), network(2)], clamp_weights=False
    )
    both.merge_weights()
    states = [model.state_dict() for model in (base, *tuned)]
    merged = network(3)
    merged.load_state_dict(dict(adamerging(states[0], states[1:], [0.2, 0.6])))
    torch.testing.assert_close(merged(x), both(x), rtol=1e-6, atol=1e-6)


def test_fisher_is_fusion_benchs(monkeypatch):
    theirs = fusion_bench_file("method/fisher_merging/fisher_merging.py", monkeypatch)
    base, models = world(11)
    fishers, _ = statistics(models)
    stacked = {name: [model[name] for model in models] for name in base}
    wanted = theirs.merging_with_fisher_weights(stacked, fishers, torch.ones(3) / 3)
    close(run("fisher", base, models), wanted, 1e-5)


def test_regmean_is_fusion_benchs(monkeypatch):
    theirs = fusion_bench_file("method/regmean/regmean.py", monkeypatch)
    base, models = world(12)
    _, grams = statistics(models)
    stacked = {name: [model[name] for model in models] for name in base}
    wanted = theirs.merging_with_regmean_weights(stacked, grams, reduce_non_diagonal_ratio=0.6)
    close(dict(regmean(base, models, grams, ridge=0.0)), wanted, 1e-4)


# ---------------------------------------------------------------- mergekit


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_ties_is_mergekits_tensor_by_tensor(keep):
    """mergekit trims each tensor by itself, so of a model of one tensor; it keeps an entry less than the paper's code."""
    sparsify = pytest.importorskip("mergekit.sparsify", reason="mergekit is not installed (make test-peers)")
    theirs = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    for seed in range(20):
        base, *models = ({"w": next(iter(one.values()))} for one in (world(seed)[0], *world(seed)[1]))
        size = base["w"].numel()
        density = (int(keep * size) + 1.5) / size
        trimmed = torch.stack([sparsify.magnitude(model["w"] - base["w"], density) for model in models])
        mask = theirs.get_mask(trimmed, "sum")
        change = (trimmed * mask).sum(0) / mask.sum(0).clamp(min=1)
        merged = run("ties", base, models, scale=1.0, keep=keep, merge="mean")
        torch.testing.assert_close(merged["w"], base["w"] + change, rtol=1e-6, atol=1e-6)
