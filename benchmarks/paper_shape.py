"""All four scripts at scale `paper` on a model of exactly google/switch-base-8's shape, random weights, on the CPU.

A trial of the way, not of the method: a handful of examples, one short epoch each. What it writes down, in
benchmarks/results/paper_shape.json, is each script's peak memory and time. Needs about 20 GB of memory and 40 GB of disk.

    python benchmarks/paper_shape.py FOLDER_WITH_SPACE [--data FOLDER_WITH_ag_news_squad_xsum]
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_base(folder: Path) -> int:
    """Write the model, with the tiny base's tokenizer, unless it is there; returns its number of parameters."""
    import torch
    from transformers import AutoTokenizer, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12,
        num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, num_experts=8, expert_capacity=64, dropout_rate=0.1,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    if not (folder / "model.safetensors").exists():
        SwitchTransformersForConditionalGeneration(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(ROOT / "base_models" / "tiny-8").save_pretrained(folder)
    with torch.device("meta"):
        return SwitchTransformersForConditionalGeneration(config).num_parameters()


def measured(words: list[str]) -> dict:
    """Run a script; {"script", "command", "seconds", "peak_GB"} of it."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{words[0]} stopped with status {os.waitstatus_to_exitcode(status)}")
    seconds, peak = time.monotonic() - started, usage.ru_maxrss / 1e6
    return {"script": words[0], "arguments": words[1:], "seconds": round(seconds, 1), "peak_GB": round(peak, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model and the runs go")
    parser.add_argument("--data", type=Path, help="local ag_news, squad and xsum folders; else the hub's")
    chosen = parser.parse_args()
    base = chosen.folder / "switch-base-8"
    # In a process of its own: a child's peak memory counts from what its parent held when it was started.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        parameters = pool.apply(make_base, (base,))
    shared = ["--scale", "paper", "--device", "cpu", "--RUN_DIR", str(chosen.folder / "runs")]
    shared += ["--BASE_MODEL_PATH", str(chosen.folder / "switch-base-{experts}"), "--num_epochs", "1"]
    shared += ["--train_examples", "4", "--validation_examples", "2", "--test_examples", "2"]
    shared += ["--batch_size", "2", "--gradient_accumulation_steps", "2", "--eval_batch_size", "2"]
    if chosen.data:
        for constant in ("AG_NEWS_PATH", "SQUAD_PATH", "XSUM_PATH"):
            shared += [f"--{constant}", str(chosen.data / constant.removesuffix("_PATH").lower())]
    rows = [measured(["datasets_preprocessing.py", *shared])]
    rows += [
        measured(["single_task_finetune.py", *shared, "--task_type", task]) for task in ("ag_news", "squad", "xsum")
    ]
    rows += [measured(["Baseline_multi_task_finetune.py", *shared]), measured(["CAEM_multi_task_finetune.py", *shared])]
    for row in rows:  # where the folders lay is nobody's business
        row["arguments"] = [
            word.replace(str(chosen.folder), "FOLDER").replace(str(chosen.data), "DATA") for word in row["arguments"]
        ]
    result = ROOT / "benchmarks" / "results" / "paper_shape.json"
    result.parent.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "system": platform.platform()}
    result.write_text(json.dumps({"parameters": parameters, "machine": machine, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(f"{row['script']:36} {row['seconds']:8.1f} s {row['peak_GB']:6.2f} GB")


if __name__ == "__main__":
    main()
