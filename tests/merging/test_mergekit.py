"""tools/merge.py against mergekit, which lives in an environment of its own: python3 -m venv .venv-peers &&
.venv-peers/bin/pip install mergekit"""

import os
import subprocess

import pytest
import torch
from conftest import ROOT, call_main
from hf_folders import write_world
from safetensors.torch import load_file, save_file

from expert_merging.core.files import write_json
from expert_merging.core.safetensors_folder import SafetensorsFolder

MERGEKIT = ROOT / ".venv-peers" / "bin" / "mergekit-yaml"
pytestmark = pytest.mark.skipif(not MERGEKIT.exists(), reason="no mergekit in .venv-peers")


def theirs(folder, method, base, models, weights, density=1.0, **parameters):
    """What mergekit makes of the folders in float32."""
    rows = [
        {"model": str(model), "parameters": {"weight": weight, **({} if method == "linear" else {"density": density})}}
        for model, weight in zip(models, weights, strict=True)
    ]
    if method == "task_arithmetic":
        for row in rows:
            del row["parameters"]["density"]
    config = {"merge_method": method, "models": rows, "parameters": parameters, "dtype": "float32"}
    if method != "linear":
        config["base_model"] = str(base)
    folder.mkdir()
    write_json(folder / "config.yml", config)  # JSON is YAML
    done = subprocess.run(
        [MERGEKIT, folder / "config.yml", folder / "out", "--quiet", "--no-copy-tokenizer"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return SafetensorsFolder(folder / "out")


def ours(folder, method, base, models, *constants):
    words = ["--method", method, "--base", str(base), "--models", *map(str, models), "--out", str(folder)]
    call_main("tools/merge.py", [*words, *(["--set", *constants] if constants else []), "--allow_unchanged"])
    return SafetensorsFolder(folder)


def same(one, other):
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "constants", "their_method", "weight", "parameters"),
    [
        ("average", (), "linear", 1.0, {"normalize": True}),
        ("task_arithmetic", ("scale=0.4",), "task_arithmetic", 0.4, {"normalize": False}),
        ("dare", ("drop=0", "scale=0.4"), "dare_linear", 0.4, {"normalize": False}),
        ("ties", ("keep=1", "scale=0.6"), "ties", 1.0, {"normalize": True, "lambda": 0.6}),
        ("ties", ("keep=1", "scale=0.6", "merge=sum"), "ties", 0.6, {"normalize": False}),
    ],
)
def test_what_mergekit_makes_of_the_same_folders(tmp_path, method, constants, their_method, weight, parameters):
    base, models = write_world(tmp_path / "w")
    found = ours(tmp_path / "ours", method, base, models, *constants)
    same(found, theirs(tmp_path / "theirs", their_method, base, models, [weight] * 2, **parameters))


def test_trimming_where_one_tensor_is_all_that_changed(tmp_path):
    """mergekit trims tensor by tensor, the paper and we the whole task vector: the same if all else stayed as it was."""
    base, models = write_world(tmp_path / "w")
    name = "model.layers.1.mlp.down_proj.weight"
    origin = dict(SafetensorsFolder(base))
    for folder in models:
        tuned = load_file(folder / "model.safetensors")[name]
        save_file(origin | {name: tuned}, folder / "model.safetensors", metadata={"format": "pt"})
    all_entries, entries = sum(tensor.numel() for tensor in origin.values()), origin[name].numel()
    kept = entries // 4
    # As the authors' code does, we keep the smallest entry that is trimmed by mergekit: one more of each vector.
    keep = (kept - 0.5) / all_entries
    found = ours(tmp_path / "ours", "ties", base, models, f"keep={keep}", "scale=1")
    wanted = theirs(
        tmp_path / "theirs", "ties", base, models, [1.0] * 2, density=(kept + 0.5) / entries, normalize=True
    )
    same(found, wanted)
    changed = int((found[name] != origin[name]).sum())
    assert kept < changed < 2 * kept
