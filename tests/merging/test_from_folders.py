"""tools/merge.py on small Llama folders: what it writes, what it refuses, and that nothing is left of what it refuses."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, call_main, run_script
from hf_folders import llama, tune, words, write_adapter, write_tokens, write_world
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expert_merging.core import safetensors_stream
from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json, sha256, write_json
from expert_merging.core.safetensors_folder import SafetensorsFolder
from expert_merging.merging import lora
from expert_merging.merging.registry import FROM_WEIGHTS, METHODS, constants

TOOL = "tools/merge.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def copied(world, tmp_path):
    """The same, to be spoilt."""
    shutil.copytree(world[0].parent, tmp_path / "w")
    return tmp_path / "w" / "base", [tmp_path / "w" / "one", tmp_path / "w" / "two"]


def merge(base, models, out, *more, method="ties"):
    words_of_base = ["--base", str(base)] if base else []
    call_main(TOOL, ["--method", method, *words_of_base, "--models", *map(str, models), "--out", str(out), *more])


def refused(said, base, models, out, *more, method="ties"):
    with pytest.raises(UserError, match=said) as found:
        merge(base, models, out, *more, method=method)
    assert "\n" not in str(found.value)
    assert not out.exists() and not list(out.parent.glob(".*.unfinished"))


@pytest.mark.parametrize("limit", [3000, 10**9])
@pytest.mark.parametrize("method", sorted(FROM_WEIGHTS))
def test_every_method_gives_what_its_function_gives(world, tmp_path, monkeypatch, method, limit):
    monkeypatch.setattr(safetensors_stream, "SHARD_BYTES", limit)
    base, models = world
    merge(base, models, tmp_path / "F", method=method)
    folders = [SafetensorsFolder(folder) for folder in (base, *models)]
    defaults = {name: constant.default for name, constant in constants([METHODS[method]]).items()} | {"seed": 0}
    wanted = dict(METHODS[method].load()(folders[0], folders[1:], **METHODS[method].arguments(defaults)))
    found = SafetensorsFolder(tmp_path / "F")
    assert set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (len(found.files) > 1) == (limit == 3000)
    loaded, left = AutoModelForCausalLM.from_pretrained(tmp_path / "F", output_loading_info=True)
    assert not any(left.values()) and torch.equal(loaded.state_dict()["lm_head.weight"], wanted["lm_head.weight"])
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "F" / name).read_bytes() == (base / name).read_bytes()


def test_dtypes_stay_and_the_sum_is_in_float32(tmp_path):
    base, models = write_world(tmp_path, torch.bfloat16)
    merge(base, models, tmp_path / "F", "--set", "scale=0.5", "--allow_unchanged", method="task_arithmetic")
    folders = [SafetensorsFolder(folder) for folder in (base, *models)]
    for name, tensor in SafetensorsFolder(tmp_path / "F").items():
        origin, *tuned = (folder[name].float() for folder in folders)
        wanted = origin + 0.5 * sum(one - origin for one in tuned)
        assert torch.equal(tensor, wanted.bfloat16())


def test_constants_by_the_name_of_argument_or_constant(world, tmp_path):
    base, models = world
    merge(base, models, tmp_path / "F", "--set", "keep=0.7", "scale=0.4", "merge=sum")
    merge(base, models, tmp_path / "G", "--set", "ties_keep=0.7", "lam=0.4", method="ties_sum")
    one, other = (SafetensorsFolder(tmp_path / name) for name in "FG")
    assert all(torch.equal(one[name], other[name]) for name in one)
    merge(base, models, tmp_path / "H", "--set", "averaged=proj,embed_tokens,lm_head", method="iso_c")
    merge(base, models, tmp_path / "I", "--set", "scale=0.5", method="task_arithmetic")
    one, other = (SafetensorsFolder(tmp_path / name) for name in "HI")
    for name in one:
        torch.testing.assert_close(one[name], other[name])
    refused("--set weight=0.5: ties has scale=1.0, keep=0.2", base, models, tmp_path / "no", "--set", "weight=0.5")
    refused("keep is a number, like 0.2", base, models, tmp_path / "no", "--set", "keep=much")
    refused("keep is a number, like 0.2", base, models, tmp_path / "no", "--set", "keep=nan")
    refused("ties: keep is 1.5", base, models, tmp_path / "no", "--set", "keep=1.5")
    refused("average has no constants", base, models, tmp_path / "no", "--set", "a=1", method="average")


def test_the_average_needs_no_base(world, tmp_path, capsys):
    _, models = world
    merge(None, models, tmp_path / "F", method="average")
    first, second = (SafetensorsFolder(folder) for folder in models)
    for name, tensor in SafetensorsFolder(tmp_path / "F").items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)
    assert f"{tmp_path / 'F'}: tensors {len(first)} merged, 0 copied, 0 left out" in capsys.readouterr().out
    refused("ties needs the model that all were fine-tuned from", None, models, tmp_path / "G")


def test_adapters_are_models_on_top_of_the_base(world, tmp_path):
    base, models = world
    whole = [write_adapter(base, tmp_path / f"adapter{i}", seed=i) for i in range(2)]
    merge(base, [tmp_path / "adapter0", models[0], tmp_path / "adapter1"], tmp_path / "F", "--set", "scale=0.5",
          method="task_arithmetic")  # fmt: skip
    origin, tuned = SafetensorsFolder(base), SafetensorsFolder(models[0])
    for name, tensor in SafetensorsFolder(tmp_path / "F").items():
        wanted = origin[name] + 0.5 * sum(one[name] - origin[name] for one in (*whole, tuned))
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)
    refused("adapter0 is an adapter; give the model", None, [tmp_path / "adapter0"], tmp_path / "G", method="average")
    content = read_json(tmp_path / "adapter1" / lora.CONFIG) | {"use_dora": True}
    write_json(tmp_path / "adapter1" / lora.CONFIG, content)
    refused("type DoRA", base, [tmp_path / "adapter0", tmp_path / "adapter1"], tmp_path / "G")


# ---------------------------------------------------------------- vocabularies


def test_vocabularies_that_differ(copied, tmp_path, capsys):
    base, (one, two) = copied
    tune(llama(vocabulary=43), 1).save_pretrained(one)  # three tokens more
    write_tokens(one, words(43))
    write_tokens(two, [*words(17), "other", *words(40)[18:]])
    refused("one has another vocabulary than .*base: 43 rows, not 40; give --common_rows", base, [one], tmp_path / "F")
    refused("two has another vocabulary than .*base: token 17 is 'other', not 'w17'", base, [two], tmp_path / "F")
    merge(base, [one, two], tmp_path / "F", "--common_rows", "--set", "scale=0.5", method="task_arithmetic")
    origin, first, second = (SafetensorsFolder(folder) for folder in (base, one, two))
    found = SafetensorsFolder(tmp_path / "F")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wanted = origin[name] + 0.5 * (first[name][:40] + second[name] - 2 * origin[name])
        wanted[17] = origin[name][17]
        torch.testing.assert_close(found[name], wanted)
        assert torch.equal(found[name][17], origin[name][17])
    assert "1 of 40 rows of model.embed_tokens.weight, lm_head.weight are" in capsys.readouterr().out


def test_a_smaller_vocabulary_than_the_bases_and_none(copied, tmp_path):
    base, (one, two) = copied
    tune(llama(vocabulary=37), 1).save_pretrained(one)
    write_tokens(one, words(37))
    (two / "tokenizer.json").unlink()
    merge(base, [two], tmp_path / "E", method="average")  # without tokens nothing says that they differ
    merge(base, [one, two], tmp_path / "F", "--common_rows", method="average")
    name = "lm_head.weight"
    origin, first, second = (SafetensorsFolder(folder)[name] for folder in (base, one, two))
    found = SafetensorsFolder(tmp_path / "F")[name]
    torch.testing.assert_close(found[:37], (first + second[:37]) / 2)
    assert torch.equal(found[37:], origin[37:])
    (one / "tokenizer.json").write_text('{"model": {"vocab": [3]}}')
    refused("tokenizer.json is no tokenizer", base, [one], tmp_path / "G", "--common_rows")


# ---------------------------------------------------------------- what is refused


def test_what_the_command_lacks(world, tmp_path):
    base, models = world
    refused("method is 'soup'; from weights alone there are average", base, models, tmp_path / "F", method="soup")
    refused("method is 'fisher'", base, models, tmp_path / "F", method="fisher")
    refused("there is no folder .*absent", base, [tmp_path / "absent"], tmp_path / "F")
    with pytest.raises(UserError, match="give the folders to merge"):
        call_main(TOOL, ["--base", str(base), "--out", str(tmp_path / "F")])
    with pytest.raises(UserError, match="give the folders to merge"):
        call_main(TOOL, ["--base", str(base), "--models", *map(str, models)])
    with pytest.raises(UserError, match="is there already, and not what this command makes"):
        merge(base, models, base)
    assert SafetensorsFolder(base)


def test_what_was_made_is_not_made_again(copied, tmp_path, monkeypatch, capsys):
    base, models = copied
    command = ["--base", str(base), "--models", *map(str, models), "--out", str(tmp_path / "F")]
    monkeypatch.setattr(sys, "argv", ["merge.py", *command])
    merge(base, models, tmp_path / "F")
    before = (tmp_path / "F" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    merge(base, models, tmp_path / "F")
    assert capsys.readouterr().out == f"{tmp_path / 'F'}: there already\n"
    assert (tmp_path / "F" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="not what this command makes"):
        merge(base, models, tmp_path / "F", "--set", "keep=0.5")
    shutil.copyfile(models[0] / "model.safetensors", models[1] / "model.safetensors")  # other files under the names
    with pytest.raises(UserError, match="not what this command makes"):
        merge(base, models, tmp_path / "F")


def test_a_tensor_missing(copied, tmp_path):
    base, (one, two) = copied
    tensors = load_file(two / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, two / "model.safetensors", metadata={"format": "pt"})
    refused("two lacks model.norm.weight, which .*base has", base, [one, two], tmp_path / "F")
    refused("two lacks model.norm.weight, which .*one has", None, [one, two], tmp_path / "F", method="average")
    refused("one.* lacks|two lacks model.norm.weight", None, [two, one], tmp_path / "F", method="average")


def test_a_shard_cut_short_or_absent_or_without_what_the_index_says(copied, tmp_path):
    base, models = copied
    shard = sorted(base.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    held = load_file(shard)
    shard.write_bytes(content[:-9])
    refused(f"{shard.name} is cut short or damaged", base, models, tmp_path / "F")
    name = next(iter(held))
    save_file({n: t for n, t in held.items() if n != name}, shard, metadata={"format": "pt"})
    refused(f"base lacks {name}, which its index has in {shard.name}", base, models, tmp_path / "F")
    shard.unlink()
    refused(shard.name, base, models, tmp_path / "F")


def test_another_architecture_or_shape(copied, tmp_path, capsys):
    base, (one, two) = copied
    tune(llama(num_attention_heads=4), 1).save_pretrained(one)  # the same shapes
    refused("one is of another architecture than .*base: head_dim 4, not 8", base, [one], tmp_path / "F")
    config = read_json(two / "config.json")
    write_json(two / "config.json", config | {"model_type": "mistral"})
    refused("two is of another architecture .*model_type mistral, not llama", base, [two], tmp_path / "F")
    write_json(two / "config.json", config | {"quantization_config": {"bits": 4}})
    refused("two holds quantised weights", base, [two], tmp_path / "F")
    (two / "config.json").write_text("[1]")
    refused("config.json is no configuration", base, [two], tmp_path / "F")
    (two / "config.json").write_text("{")
    refused("config.json is not readable JSON", base, [two], tmp_path / "F")
    (two / "config.json").unlink()
    refused("config.json does not exist", base, [two], tmp_path / "F")
    tune(llama(intermediate_size=48), 1).save_pretrained(one)
    refused(r"mlp.down_proj.weight is \(16, 32\) in .*base and \(16, 48\) in .*one", base, [one], tmp_path / "F")
    write_json(two / "config.json", config | {"rope_theta": 5.0})
    merge(base, [two], tmp_path / "F", method="task_arithmetic")
    assert "rope_theta is 5.0 in" in capsys.readouterr().out
    assert read_json(tmp_path / "F" / "config.json")["rope_theta"] == 10000.0


def test_a_tensor_that_comes_out_as_the_bases(copied, tmp_path, capsys):
    base, models = copied
    for folder in models:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] = SafetensorsFolder(base)[
            "model.norm.weight"
        ]  # by both unchanged: none to speak of
        for name in ("layers.0", "layers.1"):
            weight = f"model.{name}.input_layernorm.weight"
            changed = name == "layers.0" or folder == models[1]  # the second by one model only
            tensors[weight] = SafetensorsFolder(base)[weight] + 1e-6 * changed  # below what TIES keeps
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        "model.layers.0.input_layernorm.weight and 1 more came out equal to the base's", base, models, tmp_path / "F"
    )
    merge(base, models, tmp_path / "F", "--allow_unchanged")
    said = capsys.readouterr().out
    assert "sources differ: model.layers.0.input_layernorm.weight, model.layers.1.input_layernorm.weight" in said
    merge(base, models, tmp_path / "G", method="task_arithmetic")


def test_a_mistake_is_one_line_and_status_2(world, tmp_path):
    done = run_script(TOOL, ["--base", str(tmp_path), "--models", str(world[1][0]), "--out", str(tmp_path / "F")])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("merge.py: ") and "holds no model.safetensors" in done.stderr


# ---------------------------------------------------------------- the card and the hub


def test_the_card_says_what_it_was_made_of(world, tmp_path):
    base, models = world
    words_ = ["--base", f"{base}/", "--models", *map(str, models), "--out", str(tmp_path / "F"), "--set", "keep=0.5"]
    done = run_script(TOOL, words_)
    assert done.returncode == 0, done.stderr
    card = ModelCard.load(tmp_path / "F" / "README.md")
    assert card.data.base_model == ["base", "one", "two"] and card.data.tags == ["merge"] and card.data.license is None
    assert "different licences, apache-2.0, mit" in card.text and "TIES with scale 1.0, keep 0.5" in card.text
    assert "python tools/merge.py --base base --models one two --out F --set keep=0.5" in card.text
    for folder in (base, *models):
        assert all(sha256(file) in card.text for file in folder.glob("*.safetensors"))
    assert str(base.parent) not in (tmp_path / "F" / "README.md").read_text()


def test_an_adapter_that_is_scaled_otherwise_is_another(world, tmp_path):
    base, models = world
    write_adapter(base, tmp_path / "adapter")
    merge(base, [tmp_path / "adapter", models[0]], tmp_path / "F")
    merge(base, [tmp_path / "adapter", models[0]], tmp_path / "F")
    content = read_json(tmp_path / "adapter" / lora.CONFIG)
    write_json(tmp_path / "adapter" / lora.CONFIG, content | {"lora_alpha": 14})
    with pytest.raises(UserError, match="is there already, and not what this command makes"):
        merge(base, [tmp_path / "adapter", models[0]], tmp_path / "F")


def test_a_licence_that_all_name_is_the_models(copied, tmp_path):
    base, (one, two) = copied
    merge(base, [one], tmp_path / "F")
    assert ModelCard.load(tmp_path / "F" / "README.md").data.license == "apache-2.0"
    (one / "README.md").write_text("---\nlicense: [\n---\nbroken")
    merge(base, [one], tmp_path / "G")
    card = ModelCard.load(tmp_path / "G" / "README.md")
    assert card.data.license is None and "Not every source names one." in card.text


def test_pushing(world, tmp_path, monkeypatch):
    import huggingface_hub

    done = []

    class Hub:
        fails = ""

        def whoami(self):
            done.append("whoami")
            if self.fails == "whoami":
                raise OSError("no token\nand a second line")

        def create_repo(self, name, exist_ok):
            done.append((name, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            if self.fails == "upload":
                raise ValueError("full")
            done.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    base, models = world
    merge(base, models, tmp_path / "F", "--push_to", "me/merged")
    assert done[:2] == ["whoami", ("me/merged", True)] and done[2][0] == "me/merged"
    assert {"README.md", "config.json", "model.safetensors"} <= set(done[2][1])
    monkeypatch.setattr(Hub, "fails", "whoami")
    refused(r"push_to me/merged: .*\(no token\); log in", base, models, tmp_path / "G", "--push_to", "me/merged")
    refused("reads owner/name", base, models, tmp_path / "G", "--push_to", "merged")
    monkeypatch.setattr(Hub, "fails", "upload")
    with pytest.raises(UserError, match="G is whole, but me/merged did not take it"):
        merge(base, models, tmp_path / "G", "--push_to", "me/merged")
    assert SafetensorsFolder(tmp_path / "G")
    monkeypatch.setattr(Hub, "fails", "")
    done.clear()
    merge(base, models, tmp_path / "G", "--push_to", "me/merged")  # the same command goes on where it was
    assert done[2][0] == "me/merged"
    done.clear()
    merge(base, models, tmp_path / "H")  # looked at first, and pushed by another command
    merge(base, models, tmp_path / "H", "--push_to", "me/merged", "--allow_unchanged")
    assert done[2][0] == "me/merged"


# ---------------------------------------------------------------- memory and progress

MEASURED = """
import sys, torch
from pathlib import Path
from expert_merging.core.host_memory import give_back_freed_memory
from expert_merging.merging import from_folders
from expert_merging.merging.registry import METHODS

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 1024

def merge(place):
    read = []
    base, models, _ = from_folders.open_sources(str(place / "base"), [str(place / "one"), str(place / "two")])
    merged = from_folders.merge(method, base, models, from_folders.arguments_of(method, (), 0), False, lambda: read.append(1))
    from_folders.write(merged, base, place / f"F-{method.name}", True, lambda: "")
    return len(read), method.passes * sum(len(model.kinds) for model in models)

give_back_freed_memory()
place, method = Path(sys.argv[1]), METHODS[sys.argv[2]]
merge(place / "small")  # so that all code is in memory
before = peak()
read, expected = merge(place)
print(peak() - before, read, expected)
"""


MB = 2**20
SIZE = 8  # MB of a tensor, of which a model has eight


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Folders whose tensors are large against what the code itself takes, and small ones beside them."""
    place = tmp_path_factory.mktemp("large")
    for folder, rows in ((place / "small", 8), (place, SIZE * MB // 64)):
        for number, name in enumerate(("base", "one", "two")):
            (folder / name).mkdir(parents=True)
            generator = torch.Generator().manual_seed(number)
            tensors = {f"t{i}": torch.randn(rows, 16, generator=generator) for i in range(8)}
            save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
            write_json(folder / name / "config.json", {"model_type": "any"})
    return place


@pytest.mark.parametrize("method", ["average", "dare", "ties", "dare_ties"])
def test_memory_stays_below_two_tensors_a_source_and_one(large, method):
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(large), method], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak, read, expected = map(float, done.stdout.split())
    assert peak < (2 * 3 + 1) * SIZE and read == expected
