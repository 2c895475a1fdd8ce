"""
The paper's figure of operations against k ("Merging Experts into One", EMNLP 2023), counted, and what such counts hide.

    python benchmarks/meo_flops.py [--threads N] [--repeats N] [--from_record]

BERT of three sizes, one sequence of 128 tokens, forward: dense, vanilla MoE and MEO at sequence level, with and without the
vocabulary's head. Operations (2 a multiply-add) are counted by torch.utils.flop_counter on the meta device; beside them
time is measured (Small and Base; the largest k that fits in memory), and bytes of weights are worked out that each way moves.
Writes benchmarks/results/meo_flops.{json,md,png}. Takes a minute or two.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKENS, VOCABULARY = 128, 30522
# layers, hidden size, FFN width: prajjwal1/bert-small, bert-base and bert-large.
SHAPES = {"Small": (4, 512, 2048), "Base": (12, 768, 3072), "Large": (24, 1024, 4096)}
KS = (1, 2, 4, 8, 16, 32)
# The paper's figure, read off by eye to half a percent: (k, MoE, MEO) in 1e9 operations.
FIGURE = {
    "Small": ((1, 7.42, 7.42), (2, 9.59, 7.48), (4, 13.9, 7.49), (8, 22.6, 7.51), (16, 39.8, 7.58), (32, 74.4, 7.73)),
    "Base": ((1, 28.5, 28.5), (2, 43.0, 28.7), (4, 72.1, 28.8), (8, 130.0, 29.1), (16, 245.8, 29.5), (32, 478.0, 30.4)),
    "Large": (
        (1, 87.3, 87.3),
        (2, 139.0, 88.1),
        (4, 241.9, 88.5),
        (8, 447.7, 89.1),
        (16, 860.4, 90.8),
        (32, 1684.7, 94.1),
    ),
}
PUBLISHED = {"moe": 72.0, "meo": 28.6}  # the abstract: Base, k = 4


def bert(shape: tuple[int, int, int], mode: str, k: int, device: str, head: bool = True):
    """BERT of this shape in evaluation mode with n = k experts a linear; the bare encoder and pooler without a head."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertModel

    from expert_merging import meo

    layers, size, width = shape
    config = BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, hidden_size=size, intermediate_size=width,
        num_attention_heads=size // 64, attn_implementation="eager", pad_token_id=None,  # what looks for padding reads values
    )  # fmt: skip
    with torch.device(device):
        model = (BertForMaskedLM if head else BertModel)(config)
        if mode != "dense":
            meo.convert(model, n=k, k=k, mode=mode)
    return model.eval()


def gflops(shape: tuple[int, int, int], mode: str, k: int, head: bool = True) -> float:
    """Counted operations of one forward pass, in 1e9. One layer is counted, and counted as often as there are layers."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    layers, *sizes = shape
    counts = []
    for some in (1, 2):
        model = bert((some, *sizes), mode, k, "meta", head)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long, device="meta"))
        counts.append(counter.get_total_flops())
    one, two = counts
    return (one + (layers - 1) * (two - one)) / 1e9


def merge_once(shape: tuple[int, int, int], k: int, counted: float) -> float:
    """A MEO count in 1e9 as the paper's figure seems to count: a merge's multiply-adds as 1 operation each, not 2."""
    layers, size, width = shape
    return counted - (2 * layers * size * width * k / 1e9 if k > 1 else 0)


def moved(shape: tuple[int, int, int], mode: str, k: int) -> float:
    """GB of FFN weights in float32 that one pass reads and, merging, writes and reads again: k experts + 2 for MEO."""
    layers, size, width = shape
    matrices = {"dense": 1, "moe": k, "meo": k + 2 if k > 1 else 1}[mode]
    return 2 * layers * size * width * 4 * matrices / 1e9


def seconds(shape: tuple[int, int, int], k: int, repeats: int) -> dict[str, float]:
    """Median time of a forward pass of each way, taken in turn. The three share embeddings' shapes, not weights."""
    import torch

    from expert_merging import meo

    model = bert(shape, "meo", k, "cpu")
    ids, times = torch.randint(VOCABULARY, (1, TOKENS)), {mode: [] for mode in ("dense", "moe", "meo")}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.no_grad():
        for _ in range(repeats + 1):
            for mode, list_ in times.items():
                meo.set_mode(model, mode)
                started = clock()
                model(input_ids=ids)
                list_.append(clock() - started)
    return {mode: statistics.median(list_[1:]) for mode, list_ in times.items()}


def measure(threads: int, repeats: int, memory: float) -> dict:
    """The record: every point counted, and for Small and Base timed where the experts fit in `memory` GB."""
    import torch

    from expert_merging.run.provenance import command, versions

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    points, times = [], []
    for name, shape in SHAPES.items():
        paper = {k: {"dense": None, "moe": moe, "meo": one} for k, moe, one in FIGURE[name]}
        for mode, k in [("dense", 1), *((mode, k) for mode in ("moe", "meo") for k in KS)]:
            points.append({
                "model": name, "mode": mode, "k": k, "gflops": gflops(shape, mode, k), "figure": paper[k][mode],
                "gflops_without_head": gflops(shape, mode, k, head=False), "ffn_weights_moved_gb": moved(shape, mode, k),
            })  # fmt: skip
            print(
                "{model} {mode} k={k}: {gflops:.3f} with, {gflops_without_head:.3f} without head".format(**points[-1])
            )
    for name in ("Small", "Base"):
        for k in KS:
            layers, size, width = SHAPES[name]
            if 2 * layers * size * width * 4 * k / 1e9 <= memory:
                times.append({"model": name, "k": k, "seconds": seconds(SHAPES[name], k, repeats)})
                print(
                    f"{name} k={k}:",
                    {mode: round(value, 4) for mode, value in times[-1]["seconds"].items()},
                    flush=True,
                )
    machine = {"cores": os.cpu_count(), "threads": threads, "repeats": repeats, "processor_time": threads == 1}
    record = {
        "tokens": TOKENS,
        "published": PUBLISHED,
        "machine": machine,
        "versions": versions(),
        "command": command(),
    }
    return {**record, "points": points, "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement [5]")
    parser.add_argument("--memory", type=float, default=4.0, help="GB that the experts measured may take [4]")
    parser.add_argument("--from_record", action="store_true", help="only the tables and the figure, from the JSON file")
    chosen = parser.parse_args()
    from expert_merging.core.files import read_json, write_atomic, write_json

    path = ROOT / "benchmarks" / "results" / "meo_flops.json"
    if not chosen.from_record:
        write_json(path, measure(chosen.threads, chosen.repeats, chosen.memory))
    record = read_json(path)
    points, times = record["points"], record["times"]
    write_atomic(path.with_suffix(".md"), flops_table(points, times).markdown())
    figure(points, times, path.with_suffix(".png"))


def flops_table(points: list[dict], times: list[dict]):
    """Counted, read off the paper's figure, and measured, a row a model and k."""
    from expert_merging.report.tables import Table

    note = "1e9 operations (2 a multiply-add; in one column 1 in the merge), a sequence of 128 tokens; time against dense's."
    table = Table("flops", "Operations of vanilla MoE and MEO", note)
    by = {(point["model"], point["mode"], point["k"]): point for point in points}
    measured = {(one["model"], one["k"]): one["seconds"] for one in times}
    for model in SHAPES:
        for k in KS:
            row = {"model": model, "k": str(k)}
            for mode, label in (("moe", "MoE"), ("meo", "MEO")):
                point = by[model, mode, k]
                row |= {f"{label} in the figure": f"{point['figure']:g}", f"{label} counted": f"{point['gflops']:.2f}"}
                if mode == "meo":
                    row["MEO, merge at 1"] = f"{merge_once(SHAPES[model], k, point['gflops']):.2f}"
                row[f"{label} without head"] = f"{point['gflops_without_head']:.2f}"
            for mode, label in (("moe", "MoE"), ("meo", "MEO")):
                seconds = measured.get((model, k))
                row[f"{label} time"] = f"{seconds[mode] / seconds['dense']:.2f}" if seconds else ""
            row["MEO weights moved"] = f"{by[model, 'meo', k]['ffn_weights_moved_gb']:.2f} GB"
            table.rows.append(row)
    return table


def figure(points: list[dict], times: list[dict], path: Path) -> None:
    """Operations against k, a panel a size, with the paper's points; below: of Base, against dense, what FLOPs hide."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    from expert_merging.report import figures

    styles = {"moe": ("C1", "vanilla MoE"), "meo": ("C0", "MEO")}
    drawn, panels = plt.subplots(1, 4, figsize=(11, 3.3))
    for axes, model in zip(panels, SHAPES, strict=False):
        for mode, (colour, label) in styles.items():
            mine = [point for point in points if point["model"] == model and point["mode"] == mode]
            ks = [point["k"] for point in mine]
            axes.plot(ks, [point["gflops"] for point in mine], color=colour, label=f"{label}, counted")
            axes.plot(
                ks,
                [point["figure"] for point in mine],
                "x",
                color=colour,
                ms=5,
                label=f"{label}, in the paper's figure",
            )
            if mode == "meo":
                once = [merge_once(SHAPES[model], point["k"], point["gflops"]) for point in mine]
                axes.plot(ks, once, "--", lw=0.8, color=colour, label="MEO, the merge's counted once")
            bare = [point["gflops_without_head"] for point in mine]
            axes.plot(ks, bare, ":", color=colour, label=f"{label}, without vocabulary head")
        axes.set(title=f"BERT-{model}", xscale="log", yscale="log", xlabel="active experts k")
        axes.set_xticks(KS, KS)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    panels[0].set_ylabel("1e9 operations, 128 tokens")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=7)
    axes, base = panels[3], [point for point in points if point["model"] == "Base"]
    dense = next(point for point in base if point["mode"] == "dense")
    for mode, (colour, label) in styles.items():
        mine = [point for point in base if point["mode"] == mode]
        counted = [point["gflops"] / dense["gflops"] for point in mine]
        axes.plot([point["k"] for point in mine], counted, color=colour, label=f"{label}: operations")
        measured = [one for one in times if one["model"] == "Base"]
        relative = [one["seconds"][mode] / one["seconds"]["dense"] for one in measured]
        axes.plot([one["k"] for one in measured], relative, "--o", ms=3, color=colour, label="time")
        bytes_ = [point["ffn_weights_moved_gb"] / dense["ffn_weights_moved_gb"] for point in mine]
        axes.plot([point["k"] for point in mine], bytes_, ":", color=colour, label="FFN weights moved")
    axes.set(title="Base, against dense", xscale="log", yscale="log", xlabel="active experts k")
    axes.set_xticks(KS, KS)
    axes.set_yticks((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32))
    axes.minorticks_off()
    axes.legend(fontsize=6)
    figures.save_figure(drawn, path)


if __name__ == "__main__":
    main()
