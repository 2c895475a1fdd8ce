"""LoRA adapters as models, against peft's own merge."""

import pytest
import torch
from hf_folders import llama, write_adapter, write_world
from safetensors.torch import load_file, save_file

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json, write_json
from expert_merging.core.safetensors_folder import SafetensorsFolder
from expert_merging.merging import lora
from expert_merging.merging.model_folders import open_source


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("lora"))[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5, "down_proj": 2}},
        {"modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
    ],
)
def test_an_adapter_is_what_peft_makes_of_it(base, tmp_path, settings):
    wanted = write_adapter(base, tmp_path, **settings)
    merged = lora.on_base(SafetensorsFolder(base), tmp_path)
    assert set(merged) == set(wanted)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)
    changed = [name for name, tensor in merged.items() if not torch.equal(tensor, SafetensorsFolder(base)[name])]
    assert changed and len(changed) < len(wanted)


def test_transposed_weights(base, tmp_path):
    a, b, weight = torch.randn(2, 5), torch.randn(7, 2), torch.randn(5, 7)
    save_file({"base_model.model.c.lora_A.weight": a, "base_model.model.c.lora_B.weight": b}, tmp_path / lora.WEIGHTS)
    write_json(tmp_path / lora.CONFIG, {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "fan_in_fan_out": True})
    merged = lora.on_base({"c.weight": weight}, tmp_path)
    torch.testing.assert_close(merged["c.weight"], weight + 2 * (b @ a).T)


def test_the_sum_is_in_float32(base, tmp_path):
    write_adapter(base, tmp_path)
    half = {name: tensor.bfloat16() for name, tensor in SafetensorsFolder(base).items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = lora.on_base(half, tmp_path)
    assert merged[name].dtype == torch.float32 and not torch.equal(merged[name], merged[name].bfloat16().float())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "type DoRA; only LoRA"),
        ({"peft_type": "IA3"}, "type IA3; only LoRA"),
        *(
            ({"init_lora_weights": start}, f"began as {start} .init_lora_weights., which changes the base model")
            for start in ("pissa", "pissa_niter_16", "corda", "olora", "OLoRA", "loftq", "lora_ga")
        ),
    ],
)
def test_other_adapters(base, tmp_path, change, said):
    write_adapter(base, tmp_path)
    write_json(tmp_path / lora.CONFIG, read_json(tmp_path / lora.CONFIG) | change)
    with pytest.raises(UserError, match=said):
        lora.on_base(SafetensorsFolder(base), tmp_path)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_ways_to_begin_that_leave_the_base_as_it_is(base, tmp_path, start):
    write_adapter(base, tmp_path)
    write_json(tmp_path / lora.CONFIG, read_json(tmp_path / lora.CONFIG) | {"init_lora_weights": start})
    assert lora.on_base(SafetensorsFolder(base), tmp_path)


def test_pissa_is_merged_when_peft_has_converted_it(base, tmp_path):
    """As peft does on saving: the difference to where it began, of twice the rank."""
    import torch.distributed.tensor  # noqa: F401  (as in hf_folders)
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "as_trained")
    with pytest.raises(UserError, match="as_trained began as pissa"):
        lora.on_base(SafetensorsFolder(base), tmp_path / "as_trained")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    wanted = model.merge_and_unload().state_dict()
    for name, tensor in lora.on_base(SafetensorsFolder(base), tmp_path / "converted").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens", "v_proj"]}]
)
def test_an_embedding_that_is_the_output_matrix_too(tmp_path, settings):
    """peft trains the embedding and leaves the output matrix: no tied model is that. With two tensors there is one."""
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "adapter", **settings)
    opened = open_source(tmp_path / "base")
    with pytest.raises(
        UserError, match="adapter changes model.embed_tokens.weight as the input embedding alone"
    ) as found:
        open_source(tmp_path / "adapter", opened)
    assert "\n" not in str(found.value)
    model = llama(tie_word_embeddings=False)
    model.load_state_dict({**opened.tensors, "lm_head.weight": opened.tensors["model.embed_tokens.weight"]})
    model.save_pretrained(tmp_path / "untied")
    made = open_source(tmp_path / "adapter", open_source(tmp_path / "untied")).tensors
    assert torch.equal(made["lm_head.weight"], opened.tensors["model.embed_tokens.weight"])
    assert not torch.equal(made["model.embed_tokens.weight"], made["lm_head.weight"])


def test_an_embedding_that_is_saved_but_not_trained_is_no_change(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "adapter")
    opened, weights = open_source(tmp_path / "base"), tmp_path / "adapter" / lora.WEIGHTS
    embedding = opened.tensors["model.embed_tokens.weight"].clone()
    save_file(load_file(weights) | {"base_model.model.model.embed_tokens.weight": embedding}, weights)
    assert torch.equal(open_source(tmp_path / "adapter", opened).tensors["model.embed_tokens.weight"], embedding)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{Q}.lora_B.bias": torch.zeros(16)}, "lora_B.bias, which has no place"),
        ({f"{Q}.bias": torch.zeros(16)}, "q_proj.bias, which has no place"),
        ({f"{Q}.lora_magnitude_vector": torch.zeros(16)}, "lora_magnitude_vector, which has no place"),
        ({"base_model.model.lm_head.weight": torch.zeros(41, 16)}, "lm_head.weight, which has no place"),
        ({f"{Q}.lora_A.weight": None}, "lacks one of A and B of model.layers.0.self_attn.q_proj.weight"),
        ({f"{Q}.lora_A.weight": torch.zeros(2, 16)}, "not of one rank"),
        ({f"{Q}.lora_A.weight": torch.zeros(3, 17)}, r"adds \(16, 17\) to model.layers.0.self_attn.q_proj.weight"),
        ({f"{Q}.lora_A.weight": torch.zeros(3, 16, 1, 1)}, "of 4 dimensions"),
    ],
)
def test_what_does_not_fit_the_base(base, tmp_path, change, said):
    write_adapter(base, tmp_path)
    tensors = load_file(tmp_path / lora.WEIGHTS) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / lora.WEIGHTS)
    with pytest.raises(UserError, match=said):
        lora.on_base(SafetensorsFolder(base), tmp_path)


def test_a_damaged_adapter(base, tmp_path):
    write_adapter(base, tmp_path)
    content = (tmp_path / lora.WEIGHTS).read_bytes()
    (tmp_path / lora.WEIGHTS).write_bytes(content[:-5])
    with pytest.raises(UserError, match="missing, cut short or damaged"):
        lora.on_base(SafetensorsFolder(base), tmp_path)
    (tmp_path / lora.CONFIG).write_text("{}")
    with pytest.raises(UserError, match="type None"):
        lora.on_base(SafetensorsFolder(base), tmp_path)
