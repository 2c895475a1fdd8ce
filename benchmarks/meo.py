"""
MEO against vanilla MoE, on one model's parameters, and against the plain dense model: BERT-base's shape, n = 8 experts a
linear, k = 4, 16 sequences of 128 tokens, forward and backward in training.

    python benchmarks/meo.py [--threads N] [--pairs N] [--layers 12] [--device cpu]

The ways are timed in turn; a ratio is the median over the turns. Writes meo_cpu.json (meo_cuda.json on a
GPU) and the table meo_cpu.md (meo_cuda.md). Needs, with 12 layers, 8 GB of memory in all. With one thread the time is the
processor's.
"""

import argparse
import copy
import os
import statistics
import time
from pathlib import Path

import machine
import torch

from expert_merging import meo
from expert_merging.core.files import read_json, write_atomic
from expert_merging.report.tables import Table

ROOT = Path(__file__).resolve().parent.parent

LAYERS, SIZE, WIDTH, VOCABULARY = 12, 768, 3072, 30522
N, K, BATCH, TOKENS = 8, 4, 16, 128
FASTER, OVERHEAD, SAME = 1.8, 1.35, 1e-5  # MoE's time by MEO's; MEO's by dense's; largest difference of hidden states


def models(layers: int, device: str) -> tuple:
    """(dense, converted): BERT without dropout, with experts, gates and all else random, in training mode."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, hidden_size=SIZE, intermediate_size=WIDTH, num_attention_heads=12,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    dense = BertModel(config, add_pooling_layer=False)
    converted = meo.convert(copy.deepcopy(dense), n=N, k=K)
    with torch.no_grad():
        for module in meo.linears(converted).values():
            for parameter in (module.weight, module.w_gate):
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return tuple(one.to(device).train() for one in (dense, converted))


def run(model, ids: torch.Tensor, given: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(seconds, hidden states) of a pass forward and back; its noise is the same each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
    clock = time.process_time if torch.get_num_threads() == 1 and not ids.is_cuda else time.perf_counter
    wait()
    started = clock()
    states = model(input_ids=ids).last_hidden_state
    loss = (states * given).sum()
    if hasattr(model, "meo_settings"):
        loss = loss + meo.balance_loss(model)
    loss.backward()
    wait()
    return clock() - started, states.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--pairs", type=int, default=3, help="turns measured [3]")
    parser.add_argument("--layers", type=int, default=LAYERS, help="12 is BERT-base; fewer for less memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    dense, converted = models(chosen.layers, chosen.device)
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS), device=chosen.device)
    given = torch.randn(BATCH, TOKENS, SIZE, device=chosen.device)
    times: dict[str, list[float]] = {mode: [] for mode in meo.MODES}
    for turn in range(chosen.pairs + 1):  # the first to warm up
        states = {}
        for mode in meo.MODES:
            meo.set_mode(converted, mode)
            took, states[mode] = run(dense if mode == "dense" else converted, ids, given)
            converted.zero_grad(set_to_none=True)
            if turn:
                times[mode].append(took)
            print(f"turn {turn} {mode}: {took:.2f} s", flush=True)
    difference = (states["meo"] - states["moe"]).abs().max().item()
    shape = f"{BATCH} x {TOKENS} tokens, forward and backward"

    def row(name: str, theirs: str, over: bool, target: float) -> dict:
        pairs = [[round(a, 3), round(b, 3)] for a, b in zip(times["meo"], times[theirs], strict=True)]
        ratio = statistics.median(a / b if over else b / a for a, b in pairs)
        return {
            "name": f"{name}, {shape}", "ratio": round(ratio, 3), "target": target, "better": "lower" if over else "higher",
            "ours": round(statistics.median(times["meo"]), 3), "theirs": round(statistics.median(times[theirs]), 3),
            "unit": "s", "pairs": pairs,
        }  # fmt: skip

    rows = [row("MEO against vanilla MoE", "moe", False, FASTER), row("MEO against dense", "dense", True, OVERHEAD)]
    rows.append({
        "name": "MEO and vanilla MoE: largest difference of hidden states", "ratio": round(difference / SAME, 3), "target": 1.0,
        "better": "lower", "ours": difference, "theirs": SAME, "unit": "", "pairs": 1,
    })  # fmt: skip
    for one in rows:
        print("{name}: {ours} against {theirs} {unit}, ratio {ratio}, target {target}".format(**one))
    shape = {
        "layers": chosen.layers,
        "hidden_size": SIZE,
        "width": WIDTH,
        "n": N,
        "k": K,
        "batch": BATCH,
        "tokens": TOKENS,
    }
    device = torch.cuda.get_device_name() if ids.is_cuda else "cpu"
    path = machine.write(f"meo_{ids.device.type}", {"device": device, "shape": shape, "rows": rows})
    write_atomic(path.with_name(f"meo_{ids.device.type}.md"), table(read_json(path)).markdown())


def table(record: dict) -> Table:
    """What docs/meo.md shows."""
    shown = Table("speed", "MEO's speed", "Medians; the ratio is the median over the turns.")
    for row in record["rows"]:
        cells = {key: f"{row[key]:.3g} {row['unit']}".strip() for key in ("ours", "theirs")}
        aim = f"{'at most' if row['better'] == 'lower' else 'at least'} {row['target']:g}"
        shown.rows.append({"what": row["name"], **cells, "ratio": f"{row['ratio']:.2f}", "wanted": aim})
    return shown


if __name__ == "__main__":
    main()
