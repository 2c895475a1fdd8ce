"""
Where MEO spends a training step: forward, backward and update (clipping and AdamW) of dense, vanilla MoE and MEO at MiniLM's
shape (6 layers, 384 to 1536), 16 sequences of 32 tokens, n = 8 experts a linear, on one thread and on two.

    python benchmarks/meo_step.py [--threads 1 2] [--turns 7] [--batch 16] [--tokens 32]

Weights are random: times do not depend on them. Variants run one after the other; shown are medians, and each part by the
dense model's. Writes meo_step.json and the table meo_step.md into the machine's folder. Times are by the clock on the wall,
so on a quiet machine only. Needs 3 GB.
"""

import argparse
import statistics
import time
from typing import Any

import machine
import torch

from expert_merging import meo
from expert_merging.core.files import read_json, write_atomic
from expert_merging.report.tables import Table

LAYERS, SIZE, WIDTH, HEADS, VOCABULARY, CLASSES = 6, 384, 1536, 12, 30522, 2
N, KS, LEVELS = 8, (2, 4), ("sequence", "token")
PARTS = ("forward", "backward", "update")


def variants() -> dict[str, dict[str, Any] | None]:
    """{name: what meo.convert is given, None for the dense model}."""
    found: dict[str, dict[str, Any] | None] = {"dense": None}
    found["dense + token block"] = {"n": 1, "k": 1, "level": "token", "mode": "dense"}
    for level in LEVELS:
        for k in KS:
            for mode, name in (("moe", "MoE"), ("meo", "MEO")):
                found[f"{name} {level} k={k}"] = {"n": N, "k": k, "level": level, "mode": mode}
    return found


def model_of(settings: dict[str, Any] | None):
    """MiniLM's shape with a head, in training, without dropout; its products as MEO_finetune.py's are made."""
    from transformers import BertConfig, BertForSequenceClassification

    from caem_files import cpu_kernels

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=LAYERS, hidden_size=SIZE, intermediate_size=WIDTH, num_labels=CLASSES,
        num_attention_heads=HEADS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = cpu_kernels.use_in(BertForSequenceClassification(config))
    return (meo.convert(model, **settings) if settings else model).train()


def step(model, optimizer, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds of each part of a training step."""
    times = [time.perf_counter()]
    loss = model(**batch).loss
    times.append(time.perf_counter())
    loss.backward()
    times.append(time.perf_counter())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    times.append(time.perf_counter())
    return {part: end - start for part, start, end in zip(PARTS, times, times[1:], strict=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=7, help="measured, after one to warm up [7]")
    parser.add_argument("--batch", type=int, default=16, help="sequences [16]")
    parser.add_argument("--tokens", type=int, default=32, help="a sequence [32]")
    chosen = parser.parse_args()
    ids = torch.randint(VOCABULARY, (chosen.batch, chosen.tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(chosen.batch) % CLASSES}
    found: dict[tuple[int, str], dict[str, list[float]]] = {}
    for name, settings in variants().items():  # one at a time: each has its own experts and AdamW's two moments
        model = model_of(settings)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        for threads in chosen.threads:
            torch.set_num_threads(threads)
            turns = [step(model, optimizer, batch) for _ in range(chosen.turns + 1)][1:]
            found[threads, name] = {part: [turn[part] for turn in turns] for part in PARTS}
            medians = {part: statistics.median(times) for part, times in found[threads, name].items()}
            print(
                f"{threads} threads, {name}: " + ", ".join(f"{p} {1000 * s:.0f} ms" for p, s in medians.items()),
                flush=True,
            )
    passes = [{"threads": threads, "variant": name, "seconds": times} for (threads, name), times in found.items()]
    shape = {
        "layers": LAYERS,
        "hidden_size": SIZE,
        "width": WIDTH,
        "n": N,
        "batch": chosen.batch,
        "tokens": chosen.tokens,
    }
    path = machine.write("meo_step", {"shape": shape, "passes": passes})
    write_atomic(path.with_suffix(".md"), table(read_json(path)).markdown())


def table(record: dict) -> Table:
    """What docs/meo.md shows: a row a number of threads and variant."""
    shape = record["shape"]
    about = f"{shape['batch']} x {shape['tokens']} tokens, n = {shape['n']}"
    note = f"Medians, ms; x: by the dense model's on as many threads. {about}."
    shown = Table("step", "Where a training step goes", note)
    dense = {row["threads"]: row["seconds"] for row in record["passes"] if row["variant"] == "dense"}
    for row in sorted(record["passes"], key=lambda row: row["threads"]):
        cells: dict[str, Any] = {"threads": row["threads"], "variant": row["variant"]}
        total = base = 0.0
        for part in PARTS:
            own, plain = (statistics.median(of[part]) for of in (row["seconds"], dense[row["threads"]]))
            cells[part], cells[f"{part} x"] = f"{1000 * own:.0f}", f"{own / plain:.2f}"
            total, base = total + own, base + plain
        shown.rows.append({**cells, "step": f"{1000 * total:.0f}", "step x": f"{total / base:.2f}"})
    return shown


if __name__ == "__main__":
    main()
