"""Model folders read and written a tensor at a time."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_merging.core import safetensors_folder
from expert_merging.core.errors import UserError
from expert_merging.core.safetensors_folder import SafetensorsFolder, write_tensors


def some(number=5):
    return {f"t{i}": torch.full((10, i + 1), float(i)) for i in range(number)}


@pytest.mark.parametrize("limit", [1, 100, 400, 10_000])
def test_written_in_shards_and_read_back(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(safetensors_folder, "SHARD_BYTES", limit)
    expected = some()
    write_tensors(iter(expected.items()), tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (limit == 10_000) and not list(tmp_path.glob("part-*"))
    folder = SafetensorsFolder(tmp_path)
    assert set(folder) == set(expected) and all(torch.equal(folder[name], expected[name]) for name in expected)
    assert all(max(len(load_file(file)), 1) == 1 for file in folder.files) or limit > 1


def test_a_tied_tensor_is_held_once(tmp_path):
    shared = torch.ones(3)
    write_tensors([("shared", shared), ("encoder.embed", shared), ("other", torch.ones(3))], tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {"shared", "other"}


def test_shards_load_as_a_model(tmp_path, monkeypatch):
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    sizes = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_experts": 3, "num_layers": 2}
    config = SwitchTransformersConfig(**sizes, num_decoder_layers=2, num_sparse_encoder_layers=1)
    model = SwitchTransformersForConditionalGeneration(config)
    monkeypatch.setattr(safetensors_folder, "SHARD_BYTES", 2000)
    write_tensors(((name, p.detach()) for name, p in model.named_parameters()), tmp_path)
    config.save_pretrained(tmp_path)
    loaded = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*"))) > 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_damaged(tmp_path):
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        SafetensorsFolder(tmp_path)
    save_file(some(), tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-7])
    with pytest.raises(UserError, match="cut short or damaged"):
        SafetensorsFolder(tmp_path)
