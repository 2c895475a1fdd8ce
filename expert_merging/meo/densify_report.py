"""Tables and figures of Switch models whose experts were merged."""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from expert_merging.meo.run_records import Records, listed, seeds_text
from expert_merging.report.figures import plt, save_figure
from expert_merging.report.records import Groups, source
from expert_merging.report.tables import Stat, Table, stat


def _layer_error(result: dict, stack: str) -> float:
    return fmean(value for name, value in result["layers"].items() if name.startswith(stack))


def _by_seed(records: Records, value: Callable[[dict], float], decimals: int) -> Stat | None:
    """The mean over tasks, for each seed."""
    seeds = sorted({r["seed"] for r in records})
    return stat([fmean(value(r) for r in records if r["seed"] == seed) for seed in seeds], decimals)


def densify_tables(groups: Groups) -> list[Table]:
    """What the ways A, B, C keep of a Switch: fidelity, scores, and sizes and latencies."""
    records = listed(groups)
    origin = source(groups, *dict.fromkeys(record["run"] for record in records))
    tasks = list(dict.fromkeys(r["task"] for r in records))
    first = records[0]
    about = f"{first['identity']['source']}, {first['experts']} experts a sparse layer, {seeds_text(records)}"
    fidelity, scores = [], []
    for label in first["variants"]:
        of = [r["variants"][label] | {"seed": r["seed"], "Switch": r["Switch"]} for r in records]
        fidelity.append({
            "variant": label,
            "encoder layers": _by_seed(of, lambda v: _layer_error(v, "encoder"), 3),
            "decoder layers": _by_seed(of, lambda v: _layer_error(v, "decoder"), 3),
            "logits": _by_seed(of, lambda v: v["logits"], 3),
            "agreement": _by_seed(of, lambda v: v["agreement"], 3),
            "loss above the Switch's": _by_seed(of, lambda v: v["loss"] - v["Switch"]["loss"], 3),
            "from": origin,
        })  # fmt: skip
    for label in ("Switch", *first["variants"]):
        if label != "Switch" and "scores" not in first["variants"][label]:
            continue
        row: dict[str, Any] = {"variant": label}
        for task in tasks:
            of = [r["Switch"] if label == "Switch" else r["variants"][label] for r in records if r["task"] == task]
            score = next(r["main_score"] for r in records if r["task"] == task)
            row[f"{task} {score}"] = stat([v["scores"][score] for v in of])
            row[f"{task} same text"] = stat([v.get("same_text", 1.0) for v in of])
        scores.append(row | {"from": origin})
    costs = []
    clock = "wall" if first["device"] == "cuda" else "process"  # on a shared CPU the clock on the wall tells little
    for task in tasks:
        of = [r for r in records if r["task"] == task]
        for name in ("Switch", "dense"):
            row = {"task": task, "model": name, "parameters, M": of[0]["sizes"][name]["parameters"] / 1e6}
            row["weights, MB"] = of[0]["sizes"][name]["bytes"] / 1e6
            timed = [r for r in of if r["latency_clock"] == clock]
            for size in of[0]["latency"][name]:
                row[f"ms, {size} together"] = stat([1000 * r["latency"][name][size]["seconds"] for r in timed], 0)
                row[f"tokens, {size} together"] = stat([r["latency"][name][size]["tokens"] for r in timed], 0)
            costs.append(row | {"from": source(groups, *dict.fromkeys(record["run"] for record in of))})
    error = "|new - old| / |old| over real tokens"
    return [
        Table(
            "densify_fidelity", "Merged experts against the Switch they come from",
            f"{about}; means over {', '.join(tasks)}, {first['examples']} test examples each, teacher-forced. Layers: {error}, "
            "for the Switch's own inputs; logits the same; agreement: share of target tokens where both find the same best.",
            fidelity,
        ),
        Table(
            "densify_scores", "What the models with merged experts write",
            f"{about}; {first['examples']} test examples a task; same text: share of outputs that are the Switch's, letter by "
            "letter.", scores,
        ),
        Table(
            "densify_costs", "Size and latency of the Switch and of the dense model",
            f"{about}; median of {first['identity']['latency_runs']} runs, {first['threads']} thread(s)"
            f"{', time of the process' if first['device'] == 'cpu' else ''}, {first['identity']['num_beams']} beams; a model "
            "that writes more tokens takes longer.", costs,
        ),
    ]  # fmt: skip


def densify_figure(records: Records, folder: Path) -> dict[str, str]:
    """Layer error, agreement and loss against k, for each way; the mean over tasks and seeds."""
    quantities: dict[str, Callable[[dict, dict], float]] = {
        "relative error of a layer's output": lambda v, r: fmean(v["layers"].values()),
        "tokens where both agree": lambda v, r: v["agreement"],
        "loss above the Switch's, nats": lambda v, r: v["loss"] - r["Switch"]["loss"],
    }
    lines = {
        "A": ("A k={k}", "C0", ":"), "A, aligned": ("A k={k}, aligned", "C0", "-"),
        "A, router kept": ("A k={k}, aligned, router kept", "C2", "-"),
        "B (C at k = 1), aligned": ("B k={k}, aligned", "C1", "-"),
        "A, refitted": ("A k={k}, refitted", "C3", ":"), "A, aligned, refitted": ("A k={k}, aligned, refitted", "C3", "-"),
    }  # fmt: skip
    ks = [v["k"] for name, v in records[0]["variants"].items() if name == f"A k={v['k']}"]
    figure, panels = plt.subplots(1, 3, figsize=(9.5, 3.1))
    for axes, (label, value) in zip(panels, quantities.items(), strict=True):
        for text, style in (("no layer", "-."), ("random, refitted", "--")):
            mean = fmean(value(r["variants"][text], r) for r in records)
            axes.axhline(mean, color="0.4", lw=1, ls=style, label=text)
        for text, (pattern, color, style) in lines.items():
            points = []
            for k in ks:
                name = pattern.format(k=k)
                if k == 1:  # nothing to align
                    name = name.replace(", aligned", "").replace("B k=1", "C k=1")
                points.append(fmean(value(r["variants"][name], r) for r in records))
            axes.plot(ks, points, marker="o", ms=3, lw=1.3, color=color, ls=style, label=text)
        axes.set(title=label, xlabel="k, experts merged", xscale="log", xticks=ks, xticklabels=ks)
        axes.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    save_figure(figure, folder / "densify.png")
    return {"densify": "What merged experts keep of the Switch against k, the mean over tasks and seeds."}
