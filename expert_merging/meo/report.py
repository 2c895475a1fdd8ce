"""Tables and figures of neighbours/MEO_finetune.py and neighbours/MEO_densify.py, from their records.

python -m expert_merging.meo.report results/meo                  # again, from the records there
python -m expert_merging.meo.report results/meo runs/tiny        # after publishing the records of a run there
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json
from expert_merging.report import publish
from expert_merging.report.figures import plt, save_figure
from expert_merging.report.folders import Wing
from expert_merging.report.records import Groups, every, read, source, write
from expert_merging.report.tables import Stat, Table, save, stat

Records = list[dict[str, Any]]


def collect(run: Path) -> dict[str, Groups]:
    """{name of an experiment: its records} of what has been run below `run`. Raises UserError where there is nothing."""
    found = {folder.name: of for folder in sorted(run.glob("meo/*_*")) if (of := records_of(folder))}
    if densified := _records_in(run, "seed*/histories/densify/*.json", -4):
        found["densify"] = densified
    if not found:
        raise UserError(f"{run} has no records of neighbours/MEO_finetune.py or neighbours/MEO_densify.py")
    return found


def records_of(folder: Path) -> Groups:
    """What neighbours/MEO_finetune.py has left in the `folder` of a family and task."""
    return _records_in(folder, "seed*/*.json", -2)


def _records_in(folder: Path, pattern: str, seed: int) -> Groups:
    """The records that fit `pattern`; `seed` says which part of a path names the group."""
    groups: Groups = {}
    for file in sorted(folder.glob(pattern)):
        if not file.name.endswith(".run.json"):
            groups.setdefault(file.parts[seed], {})[file.stem] = read_json(file)
    return groups


def write_finetuning(groups: Groups, folder: Path) -> str:
    """Write records, tables and figures of one family and task into `folder`; returns the tables as text."""
    write(folder, groups)
    return "\n".join(table.markdown() for table in publish.write(folder, WING))


def tables(groups: Groups) -> list[Table]:
    """All tables of an experiment: of merged Switch models or of fine-tuning."""
    return densify_tables(groups) if _is_densify(groups) else finetuning_tables(groups)


def draw(groups: Groups, folder: Path) -> dict[str, str]:
    """Draw all figures of an experiment into `folder`; returns {name of a figure: caption}."""
    if _is_densify(groups):
        return densify_figure(_listed(groups), folder)
    return finetuning_figures(_name(_listed(groups)), _listed(groups), folder)


def _listed(groups: Groups) -> Records:
    """The records, seed by seed, each with the name of its run."""
    return [{**record, "run": run} for _, run, record in every(groups)]


def _is_densify(groups: Groups) -> bool:
    return any("variants" in record for _, _, record in every(groups))


# ---------------------------------------------------------------- fine-tuning


def _of(records: Records, **wanted) -> Records:
    """Those whose variant has these properties, by seed."""
    kept = [r for r in records if all(r["variant"][name] == value for name, value in wanted.items())]
    return sorted(kept, key=lambda r: r["seed"])


def _variants(records: Records) -> list[dict[str, Any]]:
    order = {"dense": 0, "block": 1}
    found = {r["variant"]["name"]: r["variant"] for r in records}
    return sorted(found.values(), key=lambda v: (order.get(v["how"], 2), v["level"], v["k"], v["how"] != "moe"))


def _seeds(records: Records) -> str:
    return f"seeds {', '.join(str(seed) for seed in sorted({r['seed'] for r in records}))}"


def _name(records: Records) -> str:
    return f"{records[0]['family']}_{records[0]['task']}"


def finetuning_tables(groups: Groups) -> list[Table]:
    """What each variant scores and costs; and how far MoE and MEO of the same seed are from each other."""
    records = _listed(groups)
    first, name = records[0], _name(records)
    score, where = first["main_score"], "" if first["device"] == "cuda" else "CPU "
    rows = []
    for variant in _variants(records):
        of = _of(records, name=variant["name"])
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
        f"over {_seeds(records)}. FLOPs counted by torch.utils.flop_counter in a forward pass of one sequence of {tokens}; "
        "the median training step of each run; what a training pass of one batch keeps for its backward pass."
    )
    tables = [Table(name, f"MEO: {first['family']} on {first['task']}", note, rows)]

    rows = []
    for variant in _variants(records):
        if variant["how"] != "moe" or variant["level"] == "token":
            continue
        pairs = _pairs(records, variant)
        if not pairs:
            continue
        apart = [np.abs(np.subtract(a["step_losses"], b["step_losses"])) for a, b in pairs]
        rows.append({
            "MoE and MEO": f"{variant['level']} k={variant['k']}",
            "loss of step 1": _largest(d[:1].max() for d in apart),
            "steps 1-10": _largest(d[:10].max() for d in apart),
            "all steps": _largest(d.max() for d in apart),
            "steps": len(apart[0]),
            "mean training loss": _largest(
                abs(np.mean(a["step_losses"]) - np.mean(b["step_losses"])) for a, b in pairs
            ),
            "test loss": _largest(abs(a["scores"]["test"]["loss"] - b["scores"]["test"]["loss"]) for a, b in pairs),
            f"test {score}": _largest(abs(a["scores"]["test"][score] - b["scores"]["test"][score]) for a, b in pairs),
            "seeds": len(pairs),
            "from": source(groups, *(record["run"] for record in pairs[0])),
        })  # fmt: skip
    if rows:
        note = "Largest absolute difference over seeds between a MoE and a MEO run of the same seed: both compute the same."
        tables.append(Table(f"{name}_equal", f"MoE against MEO: {first['family']} on {first['task']}", note, rows))
    return tables


def write_average(folders: dict[str, Path], folder: Path) -> str:
    """Write the table of all tasks' scores and average into `folder`, from {task: folder of its records}; returns its text."""
    table = average_table({task: records_of(place) for task, place in folders.items()})
    save([table], folder)
    return table.markdown()


def average_table(tasks: dict[str, Groups]) -> Table:
    """A row a variant, a column a task's main score, and their mean over tasks a seed; no mean with a perplexity among them."""
    found = {task: _listed(groups) for task, groups in tasks.items()}
    scores = {task: records[0]["main_score"] for task, records in found.items()}
    family = next(iter(found.values()))[0]["family"]
    note = "Test scores, mean and standard deviation over seeds, and their mean over tasks of each seed that all tasks have."
    table = Table(f"{family}_average", f"MEO: {family} on {', '.join(found)}", note)
    for variant in _variants([record for records in found.values() for record in records]):
        of = {task: _of(records, name=variant["name"]) for task, records in found.items()}
        values = {task: {r["seed"]: r["scores"]["test"][scores[task]] for r in own} for task, own in of.items()}
        row: dict[str, Any] = {"variant": variant["name"]}
        row |= {f"{task} {scores[task]}": stat(list(own.values())) for task, own in values.items()}
        if "perplexity" not in scores.values():
            shared = sorted(set.intersection(*map(set, values.values())))
            row["average"] = stat([fmean(own[seed] for own in values.values()) for seed in shared])
        places = [f"{task}/{source(tasks[task], own[0]['run'])}" for task, own in of.items() if own]
        table.rows.append(row | {"from": ", ".join(places)})
    return table


def _pairs(records: Records, variant: dict[str, Any]) -> list[tuple[dict, dict]]:
    """(MoE, MEO) of the same seed, level and k."""
    sides = [_of(records, how=how, level=variant["level"], k=variant["k"]) for how in ("moe", "meo")]
    meo = {r["seed"]: r for r in sides[1]}
    return [(r, meo[r["seed"]]) for r in sides[0] if r["seed"] in meo]


def _largest(values) -> str:
    return f"{max(float(v) for v in values):.1e}"


def finetuning_figures(name: str, records: Records, folder: Path) -> dict[str, str]:
    """Score, FLOPs and time against k; and the training curves of MoE and MEO with their difference."""
    first, score = records[0], records[0]["main_score"]
    quantities: dict[str, Callable[[dict], float]] = {
        f"test {score}": lambda r: r["scores"]["test"][score],
        "MFLOPs a sequence": lambda r: r["flops"] / 1e6,
        "ms a training step": lambda r: 1000 * (r["step_seconds"] or np.nan),
    }
    lines = list(dict.fromkeys((v["how"], v["level"]) for v in _variants(records) if v["level"]))
    figure, panels = plt.subplots(1, 3, figsize=(9.5, 3))
    for axes, (label, value) in zip(panels, quantities.items(), strict=True):
        for number, how in enumerate(("dense", "block")):
            of = [value(r) for r in _of(records, how=how)]
            if of:
                text = {"dense": "dense", "block": "dense + token block"}[how]
                axes.axhline(np.mean(of), color="0.2", lw=1, ls=("-", ":")[number], label=text)
        for number, (how, level) in enumerate(lines):
            ks = sorted({v["k"] for v in _variants(records) if (v["how"], v["level"]) == (how, level)})
            at = [[value(r) for r in _of(records, how=how, level=level, k=k)] for k in ks]
            style = "--" if how == "moe" else "-"
            text = f"{'MoE' if how == 'moe' else 'MEO'} {level}"
            axes.errorbar(
                ks, [np.mean(v) for v in at], [np.std(v, ddof=1) if len(v) > 1 else 0 for v in at], ls=style, marker="o",
                ms=4, capsize=2, lw=2.4 if how == "moe" else 1.2, color=f"C{number}", label=text,
            )  # fmt: skip
        ticks = sorted({v["k"] for v in _variants(records) if v["level"]})
        axes.set(title=label, xlabel="k, active experts", xticks=ticks)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7)
    figure.suptitle(f"{first['family']} on {first['task']}, {_seeds(records)}")
    save_figure(figure, folder / f"{name}.png")
    captions = {name: "Score, operations and time against k; a bar is a standard deviation over seeds."}

    moes = [v for v in _variants(records) if v["how"] == "moe" and v["level"] != "token" and _pairs(records, v)]
    if not moes:
        return captions
    figure, panels = plt.subplots(1, 2, figsize=(8, 3))
    for number, variant in enumerate(moes):
        pairs = _pairs(records, variant)
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


# ---------------------------------------------------------------- densify


def _layer_error(result: dict, stack: str) -> float:
    return fmean(value for name, value in result["layers"].items() if name.startswith(stack))


def _by_seed(records: Records, value: Callable[[dict], float], decimals: int) -> Stat | None:
    """The mean over tasks, for each seed."""
    seeds = sorted({r["seed"] for r in records})
    return stat([fmean(value(r) for r in records if r["seed"] == seed) for seed in seeds], decimals)


def densify_tables(groups: Groups) -> list[Table]:
    """What the ways A, B, C keep of a Switch: fidelity, scores, and sizes and latencies."""
    records = _listed(groups)
    origin = source(groups, *dict.fromkeys(record["run"] for record in records))
    tasks = list(dict.fromkeys(r["task"] for r in records))
    first = records[0]
    about = f"{first['identity']['source']}, {first['experts']} experts a sparse layer, {_seeds(records)}"
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
    ks = sorted({v["k"] for v in records[0]["variants"].values() if v["k"] > 0})
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


WING = Wing("MEO", read, tables, draw)

if __name__ == "__main__":
    publish.command(WING, collect, sys.argv[1:])
