"""tools/merge.py against mergekit on the same folders: time and peak memory of whole commands, one after the other.

    python benchmarks/merge_folders.py FOLDER_WITH_SPACE [--pairs 3]

Makes a base and two models of it, Llamas of 75 million parameters (300 MB each in float32), in FOLDER (2 GB), and merges them
by both, each command with one thread, its files in the system's cache, its result on the disk when it ends. mergekit is taken
from .venv-peers (tests/merging/test_mergekit.py says how, and that results agree); give it the torch of .venv, or what is
compared is the size of two torches. Writes the machine's merge_folders.json.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parent.parent
MERGEKIT = ROOT / ".venv-peers" / "bin" / "mergekit-yaml"
TIME, MEMORY = 0.8, 0.5  # shares of mergekit's, to stay below
CASES = {  # ours, and mergekit's configuration
    "average": ("linear", {}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.3}),
    "ties": ("ties", {"density": 0.2}),
}


def make(folder: Path) -> None:
    """The three folders."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 13, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes))
    for name in ("base", "one", "two"):
        model.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape)


def measure(command: list) -> tuple[float, float]:
    """Seconds and peak GB of a command, with what it wrote on the disk."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.sync()
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    os.sync()
    if status:
        raise RuntimeError(said)
    return time.monotonic() - started, used.ru_maxrss / 1e6


def commands(folder: Path, method: str) -> tuple[list, list]:
    """Ours and mergekit's, which write folder/ours and folder/theirs."""
    import json

    base, *models = (str(folder / name) for name in ("base", "one", "two"))
    ours = [sys.executable, "tools/merge.py", "--method", method, "--base", base, "--models", *models]
    their_name, parameters = CASES[method]
    rows = [{"model": model, "parameters": {"weight": 1.0, **parameters}} for model in models]
    config = {"merge_method": their_name, "models": rows, "dtype": "float32"}
    config |= {} if method == "average" else {"base_model": base}
    (folder / "config.yml").write_text(json.dumps(config))
    theirs = [MERGEKIT, folder / "config.yml", folder / "theirs", "--quiet", "--no-copy-tokenizer"]
    return [*ours, "--allow_unchanged", "--out", folder / "ours"], theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where models and results go")
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each case [3]")
    chosen = parser.parse_args()
    if not MERGEKIT.exists():
        parser.error("there is no mergekit in .venv-peers")
    # In a process of its own: a child's peak memory is counted from its parent's.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(make, (chosen.folder,))
    rows = []
    for method in CASES:
        found = []
        for _ in range(chosen.pairs):
            ours, theirs = commands(chosen.folder, method)
            found.append((measure(ours), measure(theirs)))
            for name in ("ours", "theirs"):
                shutil.rmtree(chosen.folder / name)
        for what, unit, target, i in (("time", "s", TIME, 0), ("peak memory", "GB", MEMORY, 1)):
            pairs = [[round(a[i], 2), round(b[i], 2)] for a, b in found]
            one, other = (statistics.median(values) for values in zip(*pairs, strict=True))
            row = {"name": f"folders of 300 MB merged by {method}, against mergekit: {what}", "unit": unit}
            row |= {"ratio": round(statistics.median(a / b for a, b in pairs), 3), "target": target, "better": "lower"}
            rows.append(row | {"ours": one, "theirs": other, "pairs": pairs})
            print("{name}: {ours} {unit} against {theirs}: ratio {ratio}, target {target}".format(**rows[-1]))
    site = next((MERGEKIT.parent.parent / "lib").glob("python*/site-packages"))
    packages = [path.name.removesuffix(".dist-info") for path in site.glob("*.dist-info")]
    theirs_are = sorted(name for name in packages if name.startswith(("mergekit-", "torch-", "transformers-")))
    machine.write("merge_folders", {"theirs": theirs_are, "rows": rows})


if __name__ == "__main__":
    main()
