"""merge and caem against Algorithm 1, written out the slow way, and what they refuse."""

import copy
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stock_switch import PLAIN, batch, build, caem, ours, same
from torch import nn

merge = caem.merge
LAYERS = {"encoder": [1, 3], "decoder": [1, 3]}


def source_model(experts=4, seed=0, **changes):
    return build(ours, PLAIN | {"num_experts": experts, "router_bias": True} | changes, seed)


def random_usage(experts, seed):
    rng = torch.Generator().manual_seed(seed)
    return {stack: torch.randint(0, 50, (2, experts), generator=rng) for stack in LAYERS}


def weighted(weights, tensors):
    return sum(w * tensor.double() for w, tensor in zip(weights, tensors, strict=True)).float()


def algorithm_1(states, usage, experts, target, alpha, reading):
    """The merged state dict but for the embeddings, and the sources' weights."""
    expected, weights = {}, {}
    for stack, blocks in LAYERS.items():
        totals = [0] * len(states)
        for number, block in enumerate(blocks):
            entropies = [float(caem.normalized_entropy(one[stack][number])) for one in usage]
            allocation = caem.allocate_experts(entropies, experts, target, alpha, reading)
            layer = f"{stack}.block.{block}.layer.{1 if stack == 'encoder' else 2}.mlp"
            slot = 0
            for i, state in enumerate(states):
                totals[i] += allocation[i]
                ranking = sorted(range(experts[i]), key=lambda j: (-int(usage[i][stack][number, j]), j))  # noqa: B023
                for j in ranking[: allocation[i]]:
                    for part in ("wi", "wo"):
                        name = f"{layer}.experts.expert_{{}}.{part}.weight"
                        expected[name.format(slot)] = state[name.format(j)]
                    for kind in ("weight", "bias"):
                        name = f"{layer}.router.classifier.{kind}"
                        rows = expected.setdefault(name, [])
                        rows.append(state[name][j])
                    slot += 1
        weights[stack] = [total / sum(totals) for total in totals]
        for name in states[0]:
            if name.startswith(stack) and ".experts." not in name and ".router." not in name and "embed" not in name:
                expected[name] = weighted(weights[stack], [state[name] for state in states])
    return {k: torch.stack(v) if isinstance(v, list) else v for k, v in expected.items()}, weights


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
    st.data(),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from(["paper", "released"]),
)
def test_merge_is_algorithm_1(experts, data, alpha, reading):
    target = data.draw(st.integers(len(experts), sum(experts)))
    states = [source_model(n, seed).state_dict() for seed, n in enumerate(experts)]
    before = copy.deepcopy(states)
    usage = [random_usage(n, data.draw(st.integers(0, 99))) for n in experts]
    state, record = merge(states, usage, target, alpha, reading)
    expected, weights = algorithm_1(states, usage, experts, target, alpha, reading)

    average = {stack: weighted(weights[stack], [one["shared.weight"] for one in states]) for stack in LAYERS}
    mean = (average["encoder"] + average["decoder"]) / 2
    names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    if reading == "paper":
        expected |= dict.fromkeys(names, mean)
    else:
        expected |= dict(zip(names, (mean, average["encoder"], average["decoder"], 2 * mean), strict=True))
    assert state.keys() == expected.keys()
    same(state, {name: expected[name] for name in state}, 1e-6)
    same(states, before, 0)
    for stack in LAYERS:
        assert record[stack]["weights"] == pytest.approx(weights[stack])
        assert all(sum(layer) == target for layer in record[stack]["allocation"])
        assert [[len(chosen) for chosen in layer] for layer in record[stack]["experts"]] == record[stack]["allocation"]

    config = caem.merged_config(ours.SwitchTransformersConfig(**PLAIN, router_bias=True), target, reading)
    model = ours.SwitchTransformersForConditionalGeneration(config)
    model.load_state_dict(state)
    assert model(**batch(0)).loss.isfinite()


@pytest.mark.parametrize("reading", ["paper", "released"])
def test_the_result_shares_no_memory_with_the_sources(reading):
    states = [source_model(seed=seed).state_dict() for seed in range(2)]
    state, _ = merge(states, [random_usage(4, 0), random_usage(4, 1)], 5, reading=reading)
    theirs = {tensor.untyped_storage().data_ptr() for one in states for tensor in one.values()}
    assert not theirs & {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert all(not tensor.requires_grad for tensor in state.values())


def test_parameters_that_require_gradients_may_be_sources():
    sources = [dict(source_model(seed=seed).named_parameters()) for seed in range(2)]
    state, _ = merge(sources, [random_usage(4, 0), random_usage(4, 1)], 4)
    assert all(not tensor.requires_grad for tensor in state.values())


def test_merging_copies_of_one_model_keeps_all_that_is_averaged():
    state = source_model().state_dict()
    merged, _ = merge([state] * 3, [random_usage(4, seed) for seed in range(3)], 7)
    for name in merged:
        if ".experts." not in name and ".router." not in name:
            torch.testing.assert_close(merged[name], state[name], atol=1e-6, rtol=1e-6)


def test_bfloat16_is_averaged_in_float32():
    states = [{k: v.to(torch.bfloat16) for k, v in source_model(seed=seed).state_dict().items()} for seed in range(3)]
    usage = [random_usage(4, seed) for seed in range(3)]
    merged, record = merge(states, usage, 6)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    exact = sum(w * one[name].float() for w, one in zip(record["encoder"]["weights"], states, strict=True))
    assert torch.equal(merged[name], exact.to(torch.bfloat16))


class OnDisk(Mapping):
    """Counts how often each tensor is asked for."""

    def __init__(self, tensors):
        self.tensors, self.asked = tensors, Counter()

    def __getitem__(self, name):
        self.asked[name] += 1
        return self.tensors[name].clone()

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_each_tensor_is_read_at_most_once_and_unused_experts_never(tmp_path):
    for seed in range(2):
        source_model(seed=seed).save_pretrained(tmp_path / str(seed))
    sources = [OnDisk(load_file(tmp_path / str(seed) / "model.safetensors")) for seed in range(2)]
    assert "lm_head.weight" not in sources[0]  # a folder holds tied weights once
    state, record = merge(sources, [random_usage(4, 0), random_usage(4, 1)], 5)
    for i, source in enumerate(sources):
        assert max(source.asked.values()) == 1
        used = sum(len(layer[i]) for stack in LAYERS for layer in record[stack]["experts"])
        assert sum(".experts." in name for name in source.asked) == 2 * used
    config = caem.merged_config(ours.SwitchTransformersConfig(**PLAIN, router_bias=True), 5)
    (tmp_path / "merged").mkdir()
    save_file(state, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path / "merged")
    load = ours.SwitchTransformersForConditionalGeneration.from_pretrained
    loaded, report = load(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and loaded.lm_head.weight is loaded.shared.weight
    assert torch.equal(loaded.shared.weight, state["shared.weight"])


def test_untied_sources_average_the_head_with_the_decoder():
    states = [source_model(seed=seed, tie_word_embeddings=False).state_dict() for seed in range(2)]
    usage = [random_usage(4, 0), {stack: torch.tensor([[9, 0, 0, 0]] * 2) for stack in LAYERS}]
    merged, record = merge(states, usage, 8)
    w = record["decoder"]["weights"]
    same(merged["lm_head.weight"], w[0] * states[0]["lm_head.weight"] + w[1] * states[1]["lm_head.weight"], 1e-6)
    assert not record["tie_word_embeddings"] and not record["separate_embeddings"]
    with pytest.raises(ValueError, match="tied"):
        merge(states, usage, 8, reading="released")


def counted_model(seed, **changes):
    model = source_model(seed=seed, **changes)
    model.set_usage_counting("paper")
    model(**batch(seed))
    return model


def test_caem_under_the_released_signature():
    models = [counted_model(seed) for seed in range(3)]
    wrapped = nn.Module()
    wrapped.STmodel = models[1]
    target = source_model(8, seed=9)
    filled, encoder, decoder = target.caem([models[0], wrapped, models[2]], target, 8, 8, 4, 1.0)
    state, record = merge([m.state_dict() for m in models], [m.expert_usage() for m in models], 8)
    assert filled is target
    same(filled.state_dict(), {name: state[name] for name in filled.state_dict()}, 0)
    assert encoder == record["encoder"]["allocation"] and decoder == record["decoder"]["allocation"]
    assert filled.lm_head.weight is filled.shared.weight
    for call in ((8, 7, 4), (7, 7, 4), (8, 8, 12)):
        with pytest.raises(ValueError, match="caem"):
            target.caem(models, target, *call, 1.0)


def test_released_reading_doubles_the_logits_and_survives_a_folder(tmp_path):
    models = [counted_model(0) for _ in range(2)]  # copies: all averages are the same in both readings
    data = batch(4)
    paper, released = source_model(6, seed=8), source_model(6, seed=9)
    paper.caem(models, paper, 6, 6, 4, 1.0)
    released.caem(models, released, 6, 6, 4, 1.0, reading="released")
    same(released(**data).logits, 2 * paper(**data).logits)
    assert released.num_parameters() == paper.num_parameters() + 3 * paper.shared.weight.numel()
    released.save_pretrained(tmp_path)
    load = ours.SwitchTransformersForConditionalGeneration.from_pretrained
    loaded = load(tmp_path).eval()
    assert not loaded.config.tie_word_embeddings
    same(loaded(**data), released(**data))
    same(loaded.state_dict(), released.state_dict(), 0)


def test_a_layer_that_saw_no_token_counts_as_entropy_zero():
    usage = [random_usage(4, seed) for seed in range(2)]
    usage[0]["encoder"][1] = 0
    _, record = merge([source_model(seed=seed).state_dict() for seed in range(2)], usage, 4)
    assert record["encoder"]["entropies"][0][1] == 0.0
    assert record["encoder"]["allocation"][1] == [1, 3] and record["encoder"]["experts"][1][0] == [0]


def broken(change):
    states = [dict(source_model(seed=seed).state_dict()) for seed in range(2)]
    usage = [random_usage(4, seed) for seed in range(2)]
    arguments = {"target_experts": 4}
    change(states, usage, arguments)
    return states, usage, arguments


def rename(state, old, new):
    for name in [name for name in state if old in name]:
        state[name.replace(old, new)] = state.pop(name)


REFUSED = {
    "one source": (lambda s, u, a: (s.pop(), u.pop()), "2 sources"),
    "too few experts": (lambda s, u, a: a.update(target_experts=1), "target_experts is 1"),
    "too many experts": (lambda s, u, a: a.update(target_experts=9), "target_experts is 9"),
    "other names": (lambda s, u, a: s[1].pop("decoder.final_layer_norm.weight"), "decoder.final_layer_norm.weight"),
    "other sparse layers": (lambda s, u, a: rename(s[1], "encoder.block.3.", "encoder.block.2."), "encoder.block"),
    "a foreign tensor": (lambda s, u, a: s[0].update({"STmodel.shared.weight": torch.zeros(1)}), "STmodel.shared"),
    "an expert missing": (
        lambda s, u, a: s[1].pop("encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight"),
        "expert_2.wi.weight",
    ),
    "a router missing": (
        lambda s, u, a: [s[0].pop(name) for name in list(s[0]) if "encoder.block.1.layer.1.mlp.router" in name],
        "router",
    ),
    "no embedding": (
        lambda s, u, a: [s[0].pop(n) for n in list(s[0]) if "shared" in n or "embed_tokens" in n],
        "shared",
    ),
    "no experts": (lambda s, u, a: [s[0].pop(name) for name in list(s[0]) if ".mlp." in name], "experts"),
    "another width": (
        lambda s, u, a: s[1].update({"encoder.final_layer_norm.weight": torch.ones(5)}),
        "encoder.final_layer_norm.weight",
    ),
    "another expert width": (
        lambda s, u, a: s[1].update({n: v[:3] for n, v in s[1].items() if n.endswith("wi.weight") and "experts" in n}),
        "wi.weight of source 1",
    ),
    "another router width": (
        lambda s, u, a: s[1].update({n: v[..., :3] for n, v in s[1].items() if n.endswith("classifier.weight")}),
        "classifier.weight of source 1",
    ),
    "tied and untied": (lambda s, u, a: s[1].update({"lm_head.weight": torch.zeros(40, 12)}), "lm_head.weight"),
    "embeddings apart": (
        lambda s, u, a: s[1].update({"encoder.embed_tokens.weight": torch.zeros(40, 12)}),
        "embed_tokens",
    ),
    "usage of another number": (lambda s, u, a: u.pop(), "usage"),
    "usage without a stack": (lambda s, u, a: u[1].pop("decoder"), "decoder"),
    "usage of another shape": (lambda s, u, a: u[1].update(decoder=torch.ones(3, 4)), "(3, 4)"),
    "usage of no token": (lambda s, u, a: u[1].update(encoder=torch.zeros(2, 4)), "all zero"),
    "usage below zero": (lambda s, u, a: u[1].update(encoder=torch.tensor([[3, -1, 1, 1]] * 2)), "negative"),
    "an unknown reading": (lambda s, u, a: a.update(reading="authors"), "reading"),
    "alpha above one": (lambda s, u, a: a.update(alpha=2.0), "alpha"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(name):
    change, words = REFUSED[name]
    states, usage, arguments = broken(change)
    with pytest.raises(ValueError) as refusal:
        merge(states, usage, **arguments)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
