"""Routers and experts by their names in every family, and CAEM on such folders."""

import json

import pytest
import torch
from conftest import call_main
from hf_folders import tune
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.switch_transformers.caem import allocate_experts, normalized_entropy

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json, sha256
from expert_merging.core.safetensors_folder import Kind, SafetensorsFolder
from expert_merging.merging import moe_caem
from expert_merging.merging.model_folders import Source
from expert_merging.merging.moe_layouts import LAYOUTS, layout_of, sparse_layers

WIDTH, NEURONS = 4, 3
FUSED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")
CASES = [(family, False) for family in LAYOUTS] + [(family, True) for family in FUSED]
PARTS = {
    "switch_transformers": ("wi.weight", "wo.weight"),
    "mixtral": ("w1.weight", "w2.weight", "w3.weight"),
}
OTHERS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
REST = {
    "qwen2_moe": ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert_gate.weight"),
    "deepseek_v2": ("mlp.shared_experts.gate_proj.weight",),
    "deepseek_v3": ("mlp.shared_experts.gate_proj.weight",),
}


def prefixes(family: str) -> list[str]:
    if family == "switch_transformers":
        return [
            "encoder.block.1.layer.1.mlp",
            "encoder.block.11.layer.1.mlp",
            "decoder.block.1.layer.2.mlp",
        ]
    return [f"model.layers.{l}.{'block_sparse_moe' if family == 'mixtral' else 'mlp'}" for l in (2, 10)]


def tensors_of(family: str, n: int, fused: bool, mark: float) -> dict[str, torch.Tensor]:
    """A model's tensors: expert e's and its router row are all mark + e, everything else is all mark."""
    tensors = {"model.embed_tokens.weight": torch.full((5, WIDTH), mark)}
    row = mark + torch.arange(n, dtype=torch.float32)
    for prefix in reversed(prefixes(family)):  # files need not be in the model's order
        router = "router.classifier" if family == "switch_transformers" else "gate"
        tensors[f"{prefix}.{router}.weight"] = row[:, None].expand(n, WIDTH).clone()
        if family == "deepseek_v3":
            tensors[f"{prefix}.gate.e_score_correction_bias"] = row.clone()
        if fused:
            tensors[f"{prefix}.experts.gate_up_proj"] = row[:, None, None].expand(n, 2 * NEURONS, WIDTH).clone()
            tensors[f"{prefix}.experts.down_proj"] = row[:, None, None].expand(n, WIDTH, NEURONS).clone()
        else:
            expert = "expert_" if family == "switch_transformers" else ""
            for part in PARTS.get(family, OTHERS):
                tensors |= {
                    f"{prefix}.experts.{expert}{e}.{part}": torch.full((NEURONS, WIDTH), mark + e) for e in range(n)
                }
        for rest in REST.get(family, ()):
            tensors[f"{prefix.removesuffix('mlp')}{rest}"] = torch.full((2, WIDTH), mark)
    # a dense layer of the same model
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.full((NEURONS, WIDTH), mark)
    return tensors


def source(tmp_path, family: str, n: int, fused: bool, mark: float, k: int = 2) -> Source:
    layout = LAYOUTS[family]
    config = {"model_type": family, layout.number: n, **({layout.chosen: k} if layout.chosen else {})}
    tensors = tensors_of(family, n, fused, mark)
    kinds = {name: Kind("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    return Source(tmp_path / f"s{mark}", tensors, kinds, config, {}, [])


def usage_files(place, counts) -> list[str]:
    place.mkdir(parents=True, exist_ok=True)
    for i, layers in enumerate(counts):
        (place / f"u{i}.json").write_text(json.dumps({"layers": layers}))
    return [str(place / f"u{i}.json") for i in range(len(counts))]


def merge(models, usage, experts, **more):
    merged = moe_caem.merge(None, models, usage, experts, **more)
    tensors = dict(merged.tensors)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        n: k.shape for n, k in merged.kinds.items()
    }
    return merged, tensors


@pytest.mark.parametrize(("family", "fused"), CASES)
def test_the_names_of_a_family(tmp_path, family, fused):
    one = source(tmp_path, family, 4, fused, 0.0)
    layers = sparse_layers(one.config, one.kinds)
    assert list(layers) == prefixes(family)
    special = moe_caem._names(layers.values())
    rest = {"model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"}
    rest |= {f"{p.removesuffix('mlp')}{name}" for p in prefixes(family) for name in REST.get(family, ())}
    assert set(one.kinds) - special == rest


@pytest.mark.parametrize(("family", "fused"), CASES)
def test_the_most_used_experts_come_with_their_rows(tmp_path, family, fused):
    depth = len(prefixes(family))

    @given(st.integers(0, 2**32 - 1), st.integers(3, 12), st.floats(0, 1))
    def property_of_any_usage(seed, experts, alpha):
        n = 4
        models = [source(tmp_path, family, n, fused, 100.0 * i) for i in range(3)]
        random = torch.Generator().manual_seed(seed)
        counts = [torch.randint(0, 20, (depth, n), generator=random) for _ in models]
        counts[0][0, 0] += 1
        counts[1][0, 0] += 1
        counts[2][0, 0] += 1
        usage = usage_files(tmp_path, [count.tolist() for count in counts])
        merged, tensors = merge(models, usage, max(experts, 3), alpha=alpha)
        assert merged.config == {LAYOUTS[family].number: experts}
        config = models[0].config | merged.config
        layers = sparse_layers(config, merged.kinds)  # the result is a model of the family with as many experts
        weights = torch.zeros(3, dtype=torch.float64)
        for l, layer in enumerate(layers.values()):
            entropies = [float(normalized_entropy(count[l])) for count in counts]
            wanted = []
            for i, a in enumerate(allocate_experts(entropies, n, experts, alpha)):
                order = sorted(range(n), key=lambda e: (-int(counts[i][l, e]), e))  # noqa: B023
                wanted += [100.0 * i + e for e in order[:a]]
                weights[i] += a
            for name in (*layer.routers, *layer.fused):
                assert tensors[name].reshape(experts, -1)[:, 0].tolist() == wanted
                assert (tensors[name] == tensors[name].reshape(experts, -1)[:, :1].reshape(experts, *[1] * (tensors[name].dim() - 1))).all()  # fmt: skip # noqa: E501
            for names in layer.experts.values():
                assert [float(tensors[names[slot]].unique()) for slot in range(experts)] == wanted
        mean = float((weights / weights.sum() * torch.tensor([0.0, 100.0, 200.0])).sum())
        for name in set(tensors) - moe_caem._names(layers.values()):
            torch.testing.assert_close(tensors[name], torch.full_like(tensors[name], mean), rtol=1e-5, atol=1e-4)

    property_of_any_usage()


@pytest.mark.parametrize(("family", "fused"), CASES)
def test_equal_sources_give_themselves_back(tmp_path, family, fused):
    """Three times the same model, and as many experts as all have: each expert stands there three times."""
    models = [source(tmp_path, family, 4, fused, 7.0) for _ in range(3)]
    depth = len(prefixes(family))
    usage = usage_files(tmp_path, [[[4, 3, 2, 1]] * depth] * 3)
    _, tensors = merge(models, usage, 12)
    layers = sparse_layers(models[0].config | {LAYOUTS[family].number: 12}, {n: Kind("F32", tuple(t.shape)) for n, t in tensors.items()})  # fmt: skip # noqa: E501
    own = models[0].tensors
    for prefix, layer in layers.items():
        before = sparse_layers(models[0].config, models[0].kinds)[prefix]
        for name in (*layer.routers, *layer.fused):
            assert torch.equal(tensors[name], own[name].repeat(3, *[1] * (own[name].dim() - 1)))
        for part, names in layer.experts.items():
            assert all(torch.equal(tensors[names[s]], own[before.experts[part][s % 4]]) for s in range(12))
    for name in set(tensors) - moe_caem._names(layers.values()):
        torch.testing.assert_close(tensors[name], own[name])


@pytest.mark.parametrize(("family", "fused"), CASES)
def test_a_source_with_all_its_experts_is_itself(tmp_path, family, fused):
    """The allocation gives the first all its experts but for the one each that the others must have."""
    models = [source(tmp_path, family, 4, fused, 100.0 * i) for i in range(2)]
    depth = len(prefixes(family))
    usage = usage_files(tmp_path, [[[1, 1, 1, 1]] * depth, [[9, 0, 0, 0]] * depth])  # entropies 1 and 0
    merged, tensors = merge(models, usage, 5)
    own = models[0].tensors
    for name in moe_caem._names(sparse_layers(models[0].config, models[0].kinds).values()):
        found = tensors[name][:4] if own[name].shape != tensors[name].shape else tensors[name]
        assert torch.equal(found, own[name])
    assert all("s0.0 4, s100.0 1" in line for line in merged.said[:depth])


def test_what_cannot_be_merged(tmp_path):
    models = [source(tmp_path, "olmoe", 4, False, float(i)) for i in range(2)]
    usage = usage_files(tmp_path, [[[1, 2, 3, 4]] * 2] * 2)

    def refused(said, models=models, usage=usage, experts=4, **more):
        with pytest.raises(UserError, match=said) as found:
            merge(models, usage, experts, **more)
        assert "\n" not in str(found.value)

    refused(r"a token is sent to 2 experts \(num_experts_per_tok\); --experts is 1", experts=1)
    refused("must be from 2 .* to 8", experts=9)
    refused("alpha must be between 0 and 1", alpha=2.0)
    refused("give --usage", usage=("",))
    refused("1 files of usage for 2 models", usage=usage[:1])
    for content, said in (
        ([[1, 2, 3]] * 2, r"shape \(2, 3\); the models' are \[2, 4\]"),
        ([[0, 0, 0, 0]] * 2, "none above 0"),
        ([[1, 2, 3, -1]] * 2, "counts below 0"),
        ([[1, 2], [3]], "must hold"),
        ("many", "must hold"),
    ):
        refused(said, usage=[usage[0], *usage_files(tmp_path / "other", [content])])
    refused("absent.json does not exist", usage=[usage[0], str(tmp_path / "absent.json")])
    other = source(tmp_path, "olmoe", 4, False, 1.0)
    models[0].words, other.words = {0: "a"}, {0: "b"}
    refused("another vocabulary than .*: token 0 is 'b', not 'a'$", models=[models[0], other])
    with pytest.raises(UserError, match="model_type is llama; experts are known of"):
        layout_of({"model_type": "llama"})
    with pytest.raises(UserError, match="deepseek_v2 with n_group 8 chooses among groups"):
        layout_of({"model_type": "deepseek_v2", "n_group": 8})
    assert layout_of({"model_type": "deepseek_v2", "n_group": 1}) is LAYOUTS["deepseek_v2"]


@pytest.mark.parametrize(
    ("drop", "change", "said"),
    [
        ("model.layers.2.mlp.gate.weight", {}, "model.layers.2.mlp does not have both"),
        ("model.layers.2.mlp.experts.1.up_proj.weight", {}, "up_proj.weight of experts 0, 2, 3; num_experts is 4"),
        ("", {"num_experts": 5}, "of experts 0, 1, 2, 3; num_experts is 5"),
        ("", {"model_type": "switch_transformers"}, "there are no experts under the names"),
    ],
)
def test_layers_that_are_not_whole(tmp_path, drop, change, said):
    one = source(tmp_path, "qwen3_moe", 4, False, 0.0)
    with pytest.raises(UserError, match=said):
        sparse_layers(one.config | change, {name: kind for name, kind in one.kinds.items() if name != drop})


SIZES = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "mixtral": lambda: MixtralConfig(**SIZES, intermediate_size=12, num_key_value_heads=1, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=12, moe_intermediate_size=6, shared_expert_intermediate_size=10,
        num_experts=4, num_experts_per_tok=2,
    ),
    "olmoe": lambda: OlmoeConfig(**SIZES, intermediate_size=12, num_experts=4, num_experts_per_tok=2),
    "switch_transformers": lambda: SwitchTransformersConfig(
        vocab_size=30, d_model=8, d_kv=4, d_ff=12, num_heads=2, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(MODELS))
def test_real_models_through_the_tool(tmp_path, capsys, family):
    kind = SwitchTransformersForConditionalGeneration if family == "switch_transformers" else None
    make = kind if kind else AutoModelForCausalLM.from_config
    for seed, name in enumerate(("one", "two", "three")):
        torch.manual_seed(0)
        tune(make(MODELS[family]()), seed).save_pretrained(tmp_path / name)
    usage = usage_files(tmp_path, [[[9, 5, 3, 1]] * 2, [[1, 1, 8, 9]] * 2, [[5, 0, 0, 5]] * 2])
    words = ["--models", *(str(tmp_path / name) for name in ("one", "two", "three")), "--usage", *usage]
    out = tmp_path / "merged"
    call_main("tools/merge.py", ["--method", "caem", *words, "--experts", "6", "--out", str(out)])
    said = capsys.readouterr().out
    assert said.count("experts from one") == 2 and "all else averaged with weights" in said
    assert read_json(out / "config.json")[LAYOUTS[family].number] == 6
    loaded, left = (kind or AutoModelForCausalLM).from_pretrained(out, output_loading_info=True)
    assert not left["missing_keys"] and not left["unexpected_keys"] and not left["mismatched_keys"]
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        more = {"decoder_input_ids": ids} if kind else {}
        assert loaded(input_ids=ids, **more).logits.isfinite().all()
    assert len(SafetensorsFolder(out)) > len(SafetensorsFolder(tmp_path / "one"))
    with pytest.raises(UserError, match="caem: .* must be from 3"):
        call_main("tools/merge.py", ["--method", "caem", *words, "--experts", "13", "--out", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


def test_other_counts_under_the_same_names_are_another_merge(tmp_path, capsys):
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(0)
        tune(AutoModelForCausalLM.from_config(MODELS["olmoe"]()), seed).save_pretrained(tmp_path / name)
    usage = usage_files(tmp_path, [[[9, 5, 3, 1]] * 2, [[1, 1, 8, 9]] * 2])
    words = ["--method", "caem", "--models", str(tmp_path / "one"), str(tmp_path / "two"), "--experts", "4", "--usage"]
    words += [*usage, "--out", str(tmp_path / "merged")]
    call_main("tools/merge.py", words)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert all(f"| usage | u{i}.json | {sha256(usage[i])} | |" in card for i in range(2))
    call_main("tools/merge.py", words)
    assert "there already" in capsys.readouterr().out
    usage_files(tmp_path, [[[1, 5, 3, 9]] * 2])
    with pytest.raises(UserError, match="merged is there already, and not what this command makes"):
        call_main("tools/merge.py", words)
    (tmp_path / "u1.json").unlink()
    with pytest.raises(UserError, match="u1.json does not exist"):
        call_main("tools/merge.py", words)


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("average", ["--usage", "U.json"], "average does not look at usage"),
        ("average", ["--experts", "8"], "leave --usage and --experts out"),
        ("caem", ["--usage", "U.json", "--experts", "8", "--common_rows"], "leave --common_rows out"),
        ("caem", ["--usage", "U.json"], "--experts is 0; caem wants the number of experts"),
    ],
)
def test_what_one_method_alone_takes_is_refused_by_others(tmp_path, method, more, said):
    words = ["--method", method, "--models", "A", "B", "--out", str(tmp_path / "F"), *more]
    with pytest.raises(UserError, match=said):
        call_main("tools/merge.py", words)
