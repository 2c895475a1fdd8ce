"""A dense Llama as a Mixtral: the same logits, noise, experts out of a split, what is refused."""

import json

import pytest
import torch
from conftest import call_main
from hf_folders import llama, words, write_tokens
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json
from expert_merging.core.safetensors_folder import SafetensorsFolder

TOOL = "tools/upcycle.py"
IDS = torch.arange(1, 22).reshape(3, 7)
FFN = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def dense_folder(place, dtype=torch.float32, **shape):
    """A Llama whose weights and norms are far from what a configuration's defaults would give."""
    model = llama(
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500.0, "rms_norm_eps": 1e-3} | shape
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(place)
    write_tokens(place, words())
    return place


def upcycle(dense, out, *more):
    call_main(TOOL, ["--dense", str(dense), "--out", str(out), *map(str, more)])
    return SafetensorsFolder(out)


def loaded(folder):
    model, left = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not left["missing_keys"] and not left["unexpected_keys"] and not left["mismatched_keys"]
    return model.eval()


def expert(tensors, layer, number, part):
    return tensors[f"model.layers.{layer}.block_sparse_moe.experts.{number}.{part}.weight"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chosen", [1, 2, 5])
def test_the_logits_are_the_dense_models(tmp_path, tied, chosen):
    dense = dense_folder(tmp_path / "dense", tie_word_embeddings=tied)
    upcycle(dense, tmp_path / "out", "--experts", 5, "--chosen", chosen)
    model = loaded(tmp_path / "out")
    assert type(model).__name__ == "MixtralForCausalLM" and model.config.num_experts_per_tok == chosen
    assert (
        read_json(tmp_path / "out" / "config.json")["sliding_window"] is None
        and model.config.tie_word_embeddings == tied
    )
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, loaded(dense)(IDS).logits, rtol=0, atol=1e-5)
        assert model.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape == (1, 10)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    assert read_json(tmp_path / "out" / "generation_config.json") == read_json(dense / "generation_config.json")


@pytest.mark.parametrize(("every", "sparse"), [(2, {1, 3}), (3, {2})])
def test_experts_in_some_layers_only(tmp_path, every, sparse):
    """A Qwen2-MoE with zero biases and a shared expert of no neuron; the other layers stay the dense ones."""
    dense = dense_folder(tmp_path / "dense", tie_word_embeddings=True, num_hidden_layers=4)
    made = upcycle(dense, tmp_path / "out", "--experts", 5, "--every", every)
    model = loaded(tmp_path / "out")
    assert type(model).__name__ == "Qwen2MoeForCausalLM" and model.config.num_experts_per_tok == 2
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, loaded(dense)(IDS).logits, rtol=0, atol=1e-4)
    assert {int(n.split(".")[2]) for n in made if n.endswith("mlp.gate.weight")} == sparse
    own = SafetensorsFolder(dense)
    assert all(torch.equal(made[name], own[name]) for name in own if name in made)
    assert {n for n in own if n not in made} == {
        f"model.layers.{l}.mlp.{part}.weight" for l in sparse for part in FFN.values()
    }
    assert sum(p.numel() for n, p in model.named_parameters() if "shared_expert." in n) == 0


def test_a_split_of_some_layers(tmp_path):
    write_parts(tmp_path / "parts", [[0, 1, 2, 3] * 8] * 2, 4)
    (tmp_path / "parts" / "0.part.4").unlink()  # of a layer that stays dense
    dense = dense_folder(tmp_path / "dense")
    made = upcycle(dense, tmp_path / "out", "--experts", 4, "--every", 2, "--parts", tmp_path / "parts")
    assert made["model.layers.1.mlp.experts.3.down_proj.weight"].shape == (16, 8)
    model = loaded(tmp_path / "out")
    assert model.config.moe_intermediate_size == 8 and model.config.intermediate_size == 32
    assert model(IDS).logits.isfinite().all()


def test_what_config_leaves_out_is_llamas_default(tmp_path):
    """Mixtral's own are others: 8 key heads, rope_theta 1e6, rms_norm_eps 1e-5."""
    dense = dense_folder(tmp_path / "dense", rope_theta=10000.0, rms_norm_eps=1e-6, num_key_value_heads=4)
    config = read_json(dense / "config.json")
    for name in ("rope_theta", "rms_norm_eps", "num_key_value_heads"):
        del config[name]
    (dense / "config.json").write_text(json.dumps(config))
    upcycle(dense, tmp_path / "out", "--experts", 2)
    with torch.no_grad():
        ours, theirs = (loaded(folder)(IDS).logits for folder in (tmp_path / "out", dense))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_routers_are_fresh_and_follow_from_the_seed(tmp_path):
    dense = dense_folder(tmp_path / "dense", hidden_size=64)
    first, again = (upcycle(dense, tmp_path / name, "--experts", 16) for name in ("first", "again"))
    other = upcycle(dense, tmp_path / "other", "--experts", 16, "--seed", 1)
    names = [f"model.layers.{l}.block_sparse_moe.gate.weight" for l in range(2)]
    for name in names:
        assert first[name].shape == (16, 64) and 0.018 < first[name].std() < 0.022
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert not torch.equal(first[names[0]], first[names[1]])


def test_noise_moves_each_expert_by_itself_and_repeats_by_seed(tmp_path):
    dense = dense_folder(tmp_path / "dense", hidden_size=32, intermediate_size=64)
    own = SafetensorsFolder(dense)
    first, again = (upcycle(dense, tmp_path / n, "--experts", 3, "--noise", 0.1) for n in ("first", "again"))
    other = upcycle(dense, tmp_path / "other", "--experts", 3, "--noise", 0.1, "--seed", 5)
    for part, name in FFN.items():
        tensor = own[f"model.layers.1.mlp.{name}.weight"]
        moved = [(expert(first, 1, e, part) - tensor) / tensor.std() for e in range(3)]
        assert all(0.09 < one.std() < 0.11 for one in moved)
        assert all((moved[i] - moved[j]).std() > 0.12 for i, j in ((0, 1), (0, 2), (1, 2)))  # independent: 0.141
        assert all(torch.equal(expert(first, 1, e, part), expert(again, 1, e, part)) for e in range(3))
        assert not any(torch.equal(expert(first, 1, e, part), expert(other, 1, e, part)) for e in range(3))
    for name in own:
        assert ".mlp." in name or torch.equal(own[name], first[name])


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("chosen", [1, 2])
def test_one_chosen_expert_teaches_the_routers_nothing_and_that_is_said(tmp_path, capsys, chosen, every):
    """Although the experts differ."""
    upcycle(dense_folder(tmp_path / "d"), tmp_path / "out", "--chosen", chosen, "--noise", 0.5, "--every", every)
    assert ("no task will ever train the routers" in capsys.readouterr().out) == (chosen == 1)
    model = loaded(tmp_path / "out")
    model(IDS, labels=IDS).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if name.endswith(".gate.weight")]
    assert gradients and all((gradient.abs().max() < 1e-6) == (chosen == 1) for gradient in gradients)


def test_the_dtype_stays(tmp_path):
    dense = dense_folder(tmp_path / "dense", torch.bfloat16)
    made = upcycle(dense, tmp_path / "out", "--experts", 2, "--noise", 0.1)
    assert {kind.dtype for kind in made.kinds().values()} == {"BF16"}
    assert read_json(tmp_path / "out" / "config.json")["torch_dtype"] == "bfloat16"


def write_parts(folder, lines_of_layers, experts):
    folder.mkdir(exist_ok=True)
    for layer, lines in enumerate(lines_of_layers):
        (folder / f"{layer}.part.{experts}").write_text("".join(f"{line}\n" for line in lines))


def test_the_experts_of_a_split_are_the_dense_ffns_neurons(tmp_path):
    dense = dense_folder(tmp_path / "dense")
    generator = torch.Generator().manual_seed(0)
    labels = [(torch.randperm(32, generator=generator) % 4).tolist() for _ in range(2)]
    write_parts(tmp_path / "parts", labels, 4)
    made = upcycle(dense, tmp_path / "out", "--experts", 4, "--chosen", 4, "--parts", tmp_path / "parts")
    own, x = SafetensorsFolder(dense), torch.randn(5, 16)
    for layer in range(2):
        gate, up, down = (own[f"model.layers.{layer}.mlp.{name}.weight"] for name in FFN.values())
        for e in range(4):
            rows = [neuron for neuron, label in enumerate(labels[layer]) if label == e]
            assert torch.equal(expert(made, layer, e, "w1"), gate[rows])
            assert torch.equal(expert(made, layer, e, "w3"), up[rows])
            assert torch.equal(expert(made, layer, e, "w2"), down[:, rows])
        ffn = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        total = 0
        for e in range(4):
            w1, w3, w2 = (expert(made, layer, e, part) for part in FFN)
            total += (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
        torch.testing.assert_close(total, ffn)
    model = loaded(tmp_path / "out")
    assert model.config.intermediate_size == 8 and model(IDS).logits.isfinite().all()


def test_neurons_in_several_experts_and_in_none(tmp_path):
    """As MoEBERT's splits have them."""
    write_parts(tmp_path / "parts", [["0,1", "", "0", " 1 "] * 8] * 2, 2)
    made = upcycle(dense_folder(tmp_path / "dense"), tmp_path / "out", "--experts", 2, "--parts", tmp_path / "parts")
    up = SafetensorsFolder(tmp_path / "dense")["model.layers.0.mlp.up_proj.weight"].reshape(8, 4, 16)
    assert torch.equal(expert(made, 0, 0, "w3"), up[:, [0, 2]].reshape(16, 16))
    assert torch.equal(expert(made, 0, 1, "w3"), up[:, [0, 3]].reshape(16, 16))


def test_a_split_as_hemoe_writes_it(tmp_path):
    from expert_merging.hemoe.split import Split, experts_from_labels

    labels = torch.arange(32).numpy() % 4
    Split("EMoE", 32, (0, 1), [experts_from_labels(labels, 4)] * 2).export_parts(tmp_path / "parts")
    made = upcycle(dense_folder(tmp_path / "dense"), tmp_path / "out", "--experts", 4, "--parts", tmp_path / "parts")
    assert expert(made, 1, 3, "w2").shape == (16, 8)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([[0] * 17 + [1] * 15, [0, 1] * 16], "experts have 15 to 17 neurons; in a Mixtral all have one size"),
        ([[0, 1] * 16, [0, 0, 0, 1] * 8], "experts have 8 to 24 neurons"),
        ([[""] * 32, [""] * 32], "experts have 0 to 0 neurons"),
        ([[0, 1] * 16], r"has no 1\.part\.2; .* with --moe_layers 0 1"),
        ([[0, 1] * 15, [0, 1] * 16], r"0\.part\.2 has 30 lines; the model has 32 neurons a layer"),
        ([[0, 1] * 16, [0, 2] * 16], r"1\.part\.2, line 2: '2' is not an expert of 0 to 1"),
    ],
)
def test_splits_that_make_no_mixtral(tmp_path, lines, said):
    write_parts(tmp_path / "parts", lines, 2)
    with pytest.raises(UserError, match=said) as found:
        upcycle(dense_folder(tmp_path / "dense"), tmp_path / "out", "--experts", 2, "--parts", tmp_path / "parts")
    assert "\n" not in str(found.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        ({"model_type": "mistral"}, (), "model_type is mistral; only a llama becomes a Mixtral"),
        ({"mlp_bias": True}, (), "mlp_bias is true; Mixtral has no biases"),
        ({"attention_bias": True}, (), "attention_bias is true; Mixtral has no biases"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, (), r"positions are scaled \(llama3\)"),
        ({"head_dim": 8}, (), "4 heads of width 8 are not hidden_size 16"),
        ({"num_hidden_layers": 3}, (), r"layers.2.mlp.gate_proj.weight is absent; by config.json it is \(32, 16\)"),
        ({"intermediate_size": 30}, (), r"gate_proj.weight is \(32, 16\); by config.json it is \(30, 16\)"),
        ({"quantization_config": {}}, (), "holds quantised weights"),
        ({}, ("--chosen", 9), "sent to chosen 9 of experts 8; it must be 1 to 8"),
        ({}, ("--chosen", 0), "it must be 1 to 8"),
        ({}, ("--every", 0), "every is 0; of 2 layers it may be 1 to 2"),
        ({}, ("--every", 3), "every is 3; of 2 layers it may be 1 to 2"),
        ({}, ("--noise", -1), "noise is -1.0; it must be 0 or more"),
        ({}, ("--noise", "nan"), "noise is nan; it must be 0 or more"),
        ({}, ("--dense", "nowhere"), "there is no folder nowhere"),
        ({}, ("--out", ""), "give the folder of a Llama and the one to be made"),
    ],
)
def test_what_is_refused(tmp_path, change, more, said):
    dense = dense_folder(tmp_path / "dense")
    (dense / "config.json").write_text(json.dumps(read_json(dense / "config.json") | change))
    with pytest.raises(UserError, match=said) as found:
        upcycle(dense, tmp_path / "out", *more)
    assert "\n" not in str(found.value) and not (tmp_path / "out").exists()


def test_a_bias_that_config_does_not_name(tmp_path):
    dense = dense_folder(tmp_path / "dense")
    tensors = dict(SafetensorsFolder(dense)) | {"model.layers.1.mlp.up_proj.bias": torch.zeros(32)}
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="has model.layers.1.mlp.up_proj.bias; Mixtral has no biases"):
        upcycle(dense, tmp_path / "out")


def test_a_folder_that_is_there(tmp_path, capsys):
    dense = dense_folder(tmp_path / "dense")
    upcycle(dense, tmp_path / "out", "--experts", 2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    upcycle(dense, tmp_path / "out", "--experts", 2)
    assert "there already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    for out, more in ((tmp_path / "out", ("--experts", 3)), (dense, ("--experts", 2))):
        with pytest.raises(UserError, match="is there already, and not what this command makes"):
            upcycle(dense, out, *more)
