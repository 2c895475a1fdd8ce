"""Where the time of scale `tiny` goes: a training step (4 examples) and a decoding (32 examples, 3 beams) of its base,
operation by operation on one thread; and, with --against, how fast both are beside another checkout.

    python benchmarks/tiny_profile.py [--against OTHER_CHECKOUT/.venv/bin/python] [--turns 7]

Operations are matrix products, those that only move or fill memory, and all others. The two checkouts run the same inputs
and weights in processes of their own, in turn. Writes tiny_profile.json and tiny_profile.md in the machine's folder.
"""

import argparse
import importlib
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "base_models" / "tiny-8"
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_linear_pointwise")
MOVES = ("copy_", "fill_", "zero_", "cat", "index_select", "index", "_index_put_impl_", "index_add_", "gather", "clone")
DECODING = {
    "num_beams": 3,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "max_length": 48,
    "early_stopping": True,
}
TARGET = 1.5


def works(fused: bool = True) -> dict:
    """{name: function}: the two pieces of work, with the patched model that this interpreter imports; AdamW as a checkout
    has it, one operation a tensor (`fused`) or ten."""
    _of_library("host_memory").keep_freed_memory()
    import torch
    from transformers import GenerationConfig, SwitchTransformersForConditionalGeneration

    beam_search = _of_library("beam_search").beam_search
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = random.Random(0)
    model = SwitchTransformersForConditionalGeneration.from_pretrained(BASE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=fused)

    def inputs(examples: int) -> dict:
        lengths = [rng.randint(60, 120) for _ in range(examples)]
        ids = torch.zeros(examples, max(lengths), dtype=torch.long)
        for row, length in enumerate(lengths):
            ids[row, :length] = torch.tensor([rng.randrange(2, 8000) for _ in range(length)])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    for_training = inputs(4) | {"labels": torch.tensor([[rng.randrange(2, 8000) for _ in range(20)] for _ in range(4)])}
    for_decoding = inputs(32)
    settings = GenerationConfig.from_model_config(model.config)
    settings.update(**DECODING)

    def step() -> None:
        model.train()(**for_training, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def decode() -> None:
        with torch.inference_mode():
            beam_search(model.eval(), **for_decoding, settings=settings)

    return {"training step": step, "decoding": decode}


def _of_library(name: str):
    """The module of that name of the library in this interpreter's checkout, in whatever folder it lies there."""
    root = Path(sys.executable).parents[2]
    (found,) = (root / "expert_merging").rglob(f"{name}.py")
    return importlib.import_module(".".join(found.relative_to(root).with_suffix("").parts))


def serve(fused: bool) -> None:
    """For every line with a name, do that work once and answer with its seconds of the processor."""
    named = works(fused)
    for work in named.values():
        work()
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.process_time()
        named[line.strip()]()
        print(time.process_time() - started, flush=True)


def shares(work) -> dict:
    """Of a piece of work, {"products", "moves", "others": share of the time, "operations": their number}."""
    from torch.profiler import ProfilerActivity, profile

    work()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    times = dict.fromkeys(("products", "moves", "others"), 0.0)
    operations = 0
    for event in found.key_averages():
        name = event.key.split("::")[-1]
        kind = "products" if name in PRODUCTS else "moves" if name in MOVES else "others"
        times[kind] += event.self_cpu_time_total
        operations += event.count if event.key.startswith("aten::") else 0
    return {kind: time / sum(times.values()) for kind, time in times.items()} | {"operations": operations}


def beside(other: str, turns: int) -> list[dict]:
    """The rows that compare with the checkout of the interpreter `other`."""
    start = [[sys.executable, __file__, "--serve", "fused"], [other, __file__, "--serve", "plain"]]
    both = []
    for words in start:
        environment = {**os.environ, "PYTHONPATH": str(Path(words[0]).parents[2])}  # not every checkout is installed
        piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        both.append(subprocess.Popen(words, env=environment, cwd="/", **piped))
    for process in both:
        process.stdout.readline()
    rows = []
    for name in ("training step", "decoding"):
        pairs = []
        for _ in range(turns):
            pair = []
            for process in both:
                process.stdin.write(name + "\n")
                process.stdin.flush()
                pair.append(float(process.stdout.readline()))
            pairs.append(pair)
        ours, theirs = (statistics.median(of) for of in zip(*pairs, strict=True))
        rows.append({
            "name": f"tiny: {name}, one thread, against the other checkout", "unit": "s", "target": TARGET,
            "ratio": round(statistics.median(b / a for a, b in pairs), 3), "ours": round(ours, 4),
            "theirs": round(theirs, 4), "pairs": pairs,
        })  # fmt: skip
    for process in both:
        process.stdin.close()
        process.wait()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="", help="the interpreter of another checkout's environment")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--serve", choices=("fused", "plain"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        return serve(chosen.serve == "fused")
    import machine

    from expert_merging.core.files import write_atomic

    found = {name: shares(work) for name, work in works().items()}
    rows = beside(chosen.against, chosen.turns) if chosen.against else []
    path = machine.write("tiny_profile", {"shares": found, "rows": rows})
    lines = ["| work | matrix products | moving memory | all else | operations |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {name} | {of['products']:.2f} | {of['moves']:.2f} | {of['others']:.2f} | {of['operations']} |"
        for name, of in found.items()
    ]
    write_atomic(path.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))
    for row in rows:
        print("{name}: {ours} s against {theirs}: ratio {ratio}, target {target}".format(**row))


if __name__ == "__main__":
    main()
