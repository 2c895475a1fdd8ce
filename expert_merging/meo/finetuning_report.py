"""Tables and figures of fine-tuning on one task."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from expert_merging.meo.run_records import (
    Records,
    having,
    largest,
    listed,
    name_of,
    pairs_of,
    seeds_text,
    variants,
)  # fmt: skip
from expert_merging.report.figures import plt, save_figure
from expert_merging.report.records import Groups, source
from expert_merging.report.tables import Table, stat


def finetuning_tables(groups: Groups) -> list[Table]:
    """What each variant scores and costs; and how far MoE and MEO of the same seed are from each other."""
    records = listed(groups)
    first, name = records[0], name_of(records)
    score, where = first["main_score"], "" if first["device"] == "cuda" else "CPU "
    rows = []
    for variant in variants(records):
        of = having(records, name=variant["name"])
        rows.append({
            "variant": variant["name"],
            score: stat([r["scores"]["test"][score] for r in of]),
            "test loss": stat([r["scores"]["test"]["loss"] for r in of], 4),
            "MFLOPs a sequence": of[0]["flops"] / 1e6,
            f"{where}ms a training step": stat([1000 * r["step_seconds"] for r in of if r["step_seconds"]], 1),
            "parameters, M": of[0]["parameters"] / 1e6,
            "kept for backward, MB": of[0]["kept_bytes"] / 1e6,
            "from": source(groups, of[0]["run"]),
        })  # fmt: skip
    tokens = f"{first['flops_length']} tokens"
    note = (
        f"{first['family']} on {first['task']}, n = {first['identity']['n']} experts in place of each FFN linear, test scores "
        f"over {seeds_text(records)}. FLOPs counted by torch.utils.flop_counter in a forward pass of one sequence of {tokens}; "
        "the median training step of each run; what a training pass of one batch keeps for its backward pass."
    )
    tables = [Table(name, f"MEO: {first['family']} on {first['task']}", note, rows)]

    rows = []
    for variant in variants(records):
        if variant["how"] != "moe" or variant["level"] == "token":
            continue
        pairs = pairs_of(records, variant)
        if not pairs:
            continue
        apart = [np.abs(np.subtract(a["step_losses"], b["step_losses"])) for a, b in pairs]
        rows.append({
            "MoE and MEO": f"{variant['level']} k={variant['k']}",
            "loss of step 1": largest(d[:1].max() for d in apart),
            "steps 1-10": largest(d[:10].max() for d in apart),
            "all steps": largest(d.max() for d in apart),
            "steps": len(apart[0]),
            "mean training loss": largest(
                abs(np.mean(a["step_losses"]) - np.mean(b["step_losses"])) for a, b in pairs
            ),
            "test loss": largest(abs(a["scores"]["test"]["loss"] - b["scores"]["test"]["loss"]) for a, b in pairs),
            f"test {score}": largest(abs(a["scores"]["test"][score] - b["scores"]["test"][score]) for a, b in pairs),
            "seeds": len(pairs),
            "from": source(groups, *(record["run"] for record in pairs[0])),
        })  # fmt: skip
    if rows:
        note = "Largest absolute difference over seeds between a MoE and a MEO run of the same seed: both compute the same."
        tables.append(Table(f"{name}_equal", f"MoE against MEO: {first['family']} on {first['task']}", note, rows))
    return tables


def finetuning_figures(name: str, records: Records, folder: Path) -> dict[str, str]:
    """Score, FLOPs and time against k; and the training curves of MoE and MEO with their difference."""
    first, score = records[0], records[0]["main_score"]
    quantities: dict[str, Callable[[dict], float]] = {
        f"test {score}": lambda r: r["scores"]["test"][score],
        "MFLOPs a sequence": lambda r: r["flops"] / 1e6,
        "ms a training step": lambda r: 1000 * (r["step_seconds"] or np.nan),
    }
    lines = list(dict.fromkeys((v["how"], v["level"]) for v in variants(records) if v["level"]))
    figure, panels = plt.subplots(1, 3, figsize=(9.5, 3))
    for axes, (label, value) in zip(panels, quantities.items(), strict=True):
        for number, how in enumerate(("dense", "block")):
            of = [value(r) for r in having(records, how=how)]
            if of:
                text = {"dense": "dense", "block": "dense + token block"}[how]
                axes.axhline(np.mean(of), color="0.2", lw=1, ls=("-", ":")[number], label=text)
        for number, (how, level) in enumerate(lines):
            ks = sorted({v["k"] for v in variants(records) if (v["how"], v["level"]) == (how, level)})
            at = [[value(r) for r in having(records, how=how, level=level, k=k)] for k in ks]
            style = "--" if how == "moe" else "-"
            text = f"{'MoE' if how == 'moe' else 'MEO'} {level}"
            axes.errorbar(
                ks, [np.mean(v) for v in at], [np.std(v, ddof=1) if len(v) > 1 else 0 for v in at], ls=style, marker="o",
                ms=4, capsize=2, lw=2.4 if how == "moe" else 1.2, color=f"C{number}", label=text,
            )  # fmt: skip
        ticks = sorted({v["k"] for v in variants(records) if v["level"]})
        axes.set(title=label, xlabel="k, active experts", xticks=ticks)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7)
    figure.suptitle(f"{first['family']} on {first['task']}, {seeds_text(records)}")
    save_figure(figure, folder / f"{name}.png")
    captions = {name: "Score, operations and time against k; a bar is a standard deviation over seeds."}

    moes = [v for v in variants(records) if v["how"] == "moe" and v["level"] != "token" and pairs_of(records, v)]
    if not moes:
        return captions
    figure, panels = plt.subplots(1, 2, figsize=(8, 3))
    for number, variant in enumerate(moes):
        pairs = pairs_of(records, variant)
        curves = [np.mean([r["step_losses"] for r in side], axis=0) for side in zip(*pairs, strict=True)]
        label = f"{variant['level']} k={variant['k']}"
        steps = np.arange(1, len(curves[0]) + 1)
        panels[0].plot(steps, _smooth(curves[0]), color=f"C{number}", lw=3, alpha=0.35, label=f"MoE {label}")
        panels[0].plot(steps, _smooth(curves[1]), color=f"C{number}", lw=1, label=f"MEO {label}")
        apart = np.max([np.abs(np.subtract(a["step_losses"], b["step_losses"])) for a, b in pairs], axis=0)
        panels[1].semilogy(steps, np.maximum(apart, 1e-9), color=f"C{number}", lw=0.8, label=label)
    panels[0].set(title="training loss, mean over seeds", xlabel="step", ylabel="with the balance loss")
    panels[1].set(title="|MoE - MEO|, largest over seeds", xlabel="step")
    panels[0].legend(fontsize=7)
    panels[1].legend(fontsize=7)
    save_figure(figure, folder / f"{name}_equal.png")
    return captions | {f"{name}_equal": "Training curves of MoE and MEO of the same seed, and how far they are apart."}


def _smooth(curve: np.ndarray, width: int = 9) -> np.ndarray:
    """Moving average, shorter at the ends."""
    ones = np.ones(min(width, len(curve)))
    return np.convolve(curve, ones, "same") / np.convolve(np.ones_like(curve), ones, "same")
