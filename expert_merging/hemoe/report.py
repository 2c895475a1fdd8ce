"""Accuracy against activated share: records of all seeds, tables that follow from them, and the figure."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder, read_json
from expert_merging.hemoe import pipeline, question_gains, record_checks
from expert_merging.hemoe.pipeline import APART, BEFORE, DENSE, METHODS
from expert_merging.report import claims, folders, index, publish
from expert_merging.report.folders import Wing
from expert_merging.report.records import Groups, joined, published, read, refuse_unlike, source, write
from expert_merging.report.tables import Table, stat
from expert_merging.run.provenance import ROOT

RESULTS = ROOT / "results" / "hemoe"
SHARES = (0.25, 0.5, 0.75)  # at which curves are compared
_LABELS = {
    "dense": "dense, as it is", "dense_tuned": "dense, tuned alike", "HEMoE": "HEMoE, neurons",
    "HEMoE_start": "HEMoE, routers from the map", "HEMoE_gate": "HEMoE, EMoE's routers", "HEMoE_modules": "HEMoE, modules",
    "HEMoE_equal": "HEMoE, equal sizes", "HEMoE_noise": "HEMoE, routers from noise",
    "HEMoE_tasks": "HEMoE, domains from tasks",
    "HEMoE_tfidf": "HEMoE, domains from TF-IDF", "MoEBERT_domains": "MoEBERT, an expert a domain",
    "random": "random, equal sizes", "random_heterogeneous": "random, HEMoE's sizes",
}  # fmt: skip
_PER_TASK = "_per_task"
_VARIANTS = {"": "", BEFORE: ", before tuning", _PER_TASK: ", tuned for each task"}
_MODELS = tuple(f"{method}{variant}" for variant in _VARIANTS for method in (*DENSE, *METHODS))  # in the order of rows
# question, the method on one side, that on the other
_QUESTIONS = (
    ("heterogeneity alone", "random_heterogeneous", "random"),
    ("importance alone", "HEMoE_equal", "random"),
    ("heterogeneity, given importance", "HEMoE", "HEMoE_equal"),
    ("importance, given heterogeneity", "HEMoE", "random_heterogeneous"),
    ("both", "HEMoE", "random"),
    ("against MoEfication", "HEMoE", "MoEfication"),
    ("against EMoE", "HEMoE", "EMoE"),
    ("against EMoE, routers alike", "HEMoE_gate", "EMoE"),
    ("EMoE's routers instead of trained ones", "HEMoE_gate", "HEMoE"),
    ("neurons instead of modules", "HEMoE", "HEMoE_modules"),
    ("routers that start from the map", "HEMoE_start", "HEMoE"),
    ("routers that start from noise", "HEMoE_noise", "HEMoE"),
    ("domains from tasks", "HEMoE_tasks", "HEMoE"),
    ("domains from TF-IDF", "HEMoE_tfidf", "HEMoE"),
)


def make(c: SimpleNamespace) -> None:
    """Write HEMOE_DIR/report from every seed there, print the tables; `publish` copies it to results/hemoe/{scale}, where it
    joins what was published from elsewhere.

    Raises UserError where no model has been measured and evaluated.
    """
    folder = Path(c.HEMOE_DIR) / "report"
    found: Groups = {}
    for path in sorted(Path(c.HEMOE_DIR).glob("seed*")):
        kept = {}
        for method in (*DENSE, *METHODS):
            kept[method] = _collected(path, method)
            kept[f"{method}{BEFORE}"] = _collected(path, method, BEFORE)
            kept[f"{method}{_PER_TASK}"] = _one_of_each_task(path, method)
        found[path.name] = {method: record for method, record in kept.items() if record}
    if not any(found.values()):
        raise UserError(f"{c.HEMOE_DIR} has no records: run the steps measure and evaluation first")
    there = RESULTS / c.scale
    if c.publish:
        found = joined(published(there), found)
    refuse_unlike(found, "HEMOE_DIR", APART)
    record_checks.leave_out_unfinished(found, _PER_TASK)
    with new_folder(folder) as place:
        write(place, found)
        shown = folders.write(place, WING, Path(c.HEMOE_DIR).name)
    for table in shown:
        print(table.markdown())
    print(f"records, tables and figure: {folder}")
    if c.publish:
        publish.publish({there: found}, WING)


def check() -> None:
    """Raises UserError where a table under results/hemoe is not what its records give."""
    if wrong := [line for folder in index.folders(RESULTS) for line in folders.check(folder, WING)]:
        raise UserError(f"{RESULTS.relative_to(ROOT)} does not follow from its records: {'; '.join(wrong)}")
    print("the tables of results/hemoe follow from their records")


def _collected(folder: Path, method: str, end: str = "") -> dict[str, Any] | None:
    """What a run of one method found, in one record; None where it has not been measured and evaluated.

    `end` is that of the names of its results (pipeline.tunings, BEFORE).
    """
    parts = {name: folder / method / f"{name}{end}.json" for name in ("tuning", "measure", "evaluation")}
    parts |= {"split": folder / method / "split.json", "conversion": folder / method / "model" / "hemoe.json"}
    if method in METHODS:
        domains = pipeline.ending(METHODS[method].domains)
        parts |= {name: folder / f"{name}{domains}.json" for name in ("domains", "scores")}
    there = {name: read_json(path) for name, path in parts.items() if path.exists()}
    if not {"measure", "evaluation"} <= there.keys():
        return None
    last = there["evaluation"]
    ks = sorted(there["measure"]["k"].keys() & last["k"].keys(), key=int)
    return {
        **{name: last[name] for name in ("command", "versions", "seed", "identity")}, "method": method,
        "split": there.get("split", {}).get("split"), "agreement": there.get("split", {}).get("agreement"),
        "training": there.get("tuning", {}).get("training"),
        "k": {k: {**there["measure"]["k"][k], **_accuracies(last["k"][k])} for k in ks}, "seconds": _seconds(there),
    }  # fmt: skip


def _seconds(there: dict[str, Any]) -> dict[str, float]:
    """What each step took, as far as it is noted; of the steps that go through several k, the mean of one."""
    timed = {"domains": "domains", "scores": "scores", "split": "partition", "conversion": "conversion"}
    spent = {step: there[name]["seconds"] for name, step in timed.items() if "seconds" in there.get(name, {})}
    if "tuning" in there:
        spent["tuning"] = there["tuning"]["training"]["seconds"]
    for name in ("measure", "evaluation"):
        if "seconds" in there[name]:
            spent[f"{name}, one k"] = float(np.mean(list(there[name]["seconds"].values())))
    return spent


def _one_of_each_task(folder: Path, method: str) -> dict[str, Any] | None:
    """The models that were tuned for one task each as one record, each task's numbers from its own model."""
    paths = sorted((folder / method).glob("evaluation_*.json"))
    ends = [end for path in paths if (end := path.stem.removeprefix("evaluation")) != BEFORE]
    found = {end.removeprefix("_"): record for end in ends if (record := _collected(folder, method, end))}
    if not found:
        return None
    first = next(iter(found.values()))
    points = {}
    for k in first["k"]:
        of_task = {task: record["k"][k] for task, record in found.items() if k in record["k"]}
        if len(of_task) == len(found):
            names = dict.fromkeys(name for point in of_task.values() for name in point)
            points[k] = {
                name: {task: value for point in of_task.values() for task, value in point.get(name, {}).items()}
                for name in names
                if name not in ("share_by_layer", "use")
            }
    return {
        **first,
        "k": points,
        "training": {task: record["training"] for task, record in found.items()},
        "seconds": {},
    }


def _accuracies(found: dict[str, Any]) -> dict[str, Any]:
    """{"accuracy": {task: main}, and of each task "acc", "acc_norm" and the questions' packed scores}."""
    names = dict.fromkeys(name for of_task in found.values() for name in of_task if name != "main")
    by_name = {name: {task: of[name] for task, of in found.items() if name in of} for name in names}
    return {"accuracy": {task: of["main"] for task, of in found.items()}, **by_name}


def curve(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """{"share", "accuracy" (percent), "loss"} of a record, each [k], by rising share; means over tasks.

    The share of a dense model is 1.
    """
    points = [
        (
            np.mean(list(one["share"].values())) if "share" in one else 1.0,
            100 * np.mean(list(one["accuracy"].values())),
            np.mean(list(one["loss"].values())),
        )
        for one in record["k"].values()
    ]
    share, accuracy, loss = np.array(sorted(points)).T
    return {"share": share, "accuracy": accuracy, "loss": loss}


def at(record: dict[str, Any], what: str, share: float) -> float | None:
    """A curve at an activated share, by straight lines between the measured points; None outside of them."""
    points = curve(record)
    inside = points["share"][0] <= share <= points["share"][-1]
    return float(np.interp(share, points["share"], points[what])) if inside else None


def mean_difference(one: dict[str, Any], other: dict[str, Any], what: str) -> float:
    """The mean difference of two curves over the shares that both cover, from equal to equal."""
    first, second = curve(one), curve(other)
    low, high = max(first["share"][0], second["share"][0]), min(first["share"][-1], second["share"][-1])
    grid = np.linspace(low, high, 201)
    gap = np.interp(grid, first["share"], first[what]) - np.interp(grid, second["share"], second[what])
    return float(gap.mean())


def tables(records: Groups) -> list[Table]:
    """What there is to say, from the records alone."""
    made = (
        _at_shares(records), question_gains.by_task(records, _MODELS, _NAMES), _questions(records),
        question_gains.gains(records, _ASKED, _NAMES), _points(records), _splits(records), _cost(records),
    )  # fmt: skip
    return [table for table in made if table.rows]


def _at_shares(records: Groups) -> Table:
    note = "Mean over tasks of 0-shot accuracy (%) by lm_eval, and of the loss of held-out answers (nats a token), at equal"
    table = Table(
        "accuracy_at_share", "Accuracy at equal activated share",
        f"{note} activated shares of the experts' neurons, between measured points by straight lines; {_seeds(records)}.",
    )  # fmt: skip
    points = [(what, share) for what in ("accuracy", "loss") for share in (*SHARES, 1.0)]
    found = {
        method: {point: [_value(one[method], *point) for one in records.values() if method in one] for point in points}
        for method in _MODELS
    }

    def met(values: list[float | None]) -> bool:
        return any(value is not None for value in values)

    points = [point for point in points if any(met(of[point]) for of in found.values())]
    for method, of in found.items():
        if any(met(of[point]) for point in points):
            shown = {
                f"{what} at {share:g}": stat(of[what, share], 2 if what == "accuracy" else 3) for what, share in points
            }
            table.rows.append({"model": _name(method), **shown, "from": source(records, method)})
    return table


def _value(record: dict[str, Any], what: str, share: float) -> float | None:
    if share == 1.0 and record["k"]:  # all neurons, or as many as its experts have when all fire
        points = curve(record)
        return float(points[what][-1]) if points["share"][-1] > 0.999 else None
    return at(record, what, share)


def _questions(records: Groups) -> Table:
    table = Table(
        "gains", "Where the gain comes from",
        "Difference of two curves, mean over the activated shares that both cover: accuracy in points (more is better), "
        "loss in nats (less is better); mean over seeds [95% interval by Student's t] (each seed).",
    )  # fmt: skip
    for question, one, other in _ASKED:
        pairs = [
            (of[one], of[other]) for of in records.values() if question_gains.comparable(of.get(one), of.get(other))
        ]
        if pairs:
            row: dict[str, Any] = {"question": question, "difference": f"{_name(one)} - {_name(other)}"}
            for what, decimals in (("accuracy", 2), ("loss", 4)):
                row[what] = claims.shown([mean_difference(*pair, what) for pair in pairs], decimals)
            table.rows.append({**row, "from": source(records, one, other)})
    return table


def _points(records: Groups) -> Table:
    table = Table(
        "points", "Every measured point",
        f"k experts fire; share of the experts' neurons that is activated; {_seeds(records)}.",
    )  # fmt: skip
    for method in _MODELS:
        found = [of[method] for of in records.values() if method in of]
        for k in sorted({k for record in found for k in record["k"]}, key=int):
            points = [record["k"][k] for record in found if k in record["k"]]
            tasks = points[0]["accuracy"]
            table.rows.append(
                {
                    "model": _name(method), "k": "" if k == "0" else k,
                    "share": stat([np.mean(list(p["share"].values())) if "share" in p else 1.0 for p in points], 3),
                    "accuracy": stat([100 * np.mean(list(p["accuracy"].values())) for p in points]),
                    "loss": stat([np.mean(list(p["loss"].values())) for p in points], 3),
                    **{task: stat([100 * p["accuracy"][task] for p in points], 1) for task in tasks},
                    "from": source(records, method),
                }
            )  # fmt: skip
    return table


def _splits(records: Groups) -> Table:
    agree = any(one.get("agreement") is not None for of_seed in records.values() for one in of_seed.values())
    alike = "; agreement with HEMoE's partition: adjusted Rand index, 1 the same, 0 as by chance" if agree else ""
    table = Table(
        "splits", "The partitions",
        "Sizes of the experts over all neurons, ascending, mean over layers and seeds; of the solver: objective over its "
        f"proved bound, mean over layers and seeds{alike}.",
    )  # fmt: skip
    for method in METHODS:
        splits = [of[method]["split"] for of in records.values() if method in of]
        if splits:
            sizes = np.mean([np.sort(s["sizes"], axis=1) / s["neurons"] for s in splits], axis=(0, 1))
            solved = [o / b for s in splits for o, b in zip(s["objective"], s["bound"], strict=True) if o and b]
            table.rows.append(
                {
                    "model": _name(method), "sizes": " ".join(f"{size:.3f}" for size in sizes),
                    "objective / bound": float(np.mean(solved)) if solved else None,
                    **({"agreement": stat([of[method].get("agreement") for of in records.values() if method in of], 3)}
                       if agree else {}),
                    "from": source(records, method),
                }
            )  # fmt: skip
    return table


def _cost(records: Groups) -> Table:
    table = Table(
        "cost", "What the steps take",
        f"Seconds by the clock; of measure and evaluation for one k. {_seeds(records).capitalize()}.",
    )  # fmt: skip
    for method in _MODELS:
        spent = [of[method]["seconds"] for of in records.values() if of.get(method, {}).get("seconds")]
        if spent:
            row: dict[str, Any] = {"model": _name(method)}
            for step in (
                "domains",
                "scores",
                "partition",
                "conversion",
                "tuning",
                "measure, one k",
                "evaluation, one k",
            ):
                row[step] = stat([one.get(step) for one in spent], 1)
            table.rows.append(row | {"from": source(records, method)})
    return table


def _name(model: str) -> str:
    variant = next((end for end in (BEFORE, _PER_TASK) if model.endswith(end)), "")
    method = model.removesuffix(variant)
    return _LABELS.get(method, method) + _VARIANTS[variant]


_NAMES = {model: _name(model) for model in _MODELS}
_ASKED = tuple(
    (question + said, f"{one}{variant}", f"{other}{variant}")
    for variant, said in _VARIANTS.items()
    for question, one, other in _QUESTIONS
)


def _seeds(records: Groups) -> str:
    seeds = ", ".join(group.removeprefix("seed") for group in records)
    return f"mean ± standard deviation over seeds {seeds}" if len(records) > 1 else "one seed"


def draw(records: Groups, folder: Path) -> dict[str, str]:
    """Draw accuracy and loss against the activated share into `folder`; returns {name of the figure: caption}."""
    from expert_merging.report.figures import plt, save_figure

    drawn, panels = plt.subplots(1, 2, figsize=(9.5, 4))
    for axes, what, label in zip(panels, ("accuracy", "loss"), ("accuracy, %", "loss, nats a token"), strict=True):
        for number, method in enumerate(METHODS):
            found = [of[method]["k"] for of in records.values() if method in of]
            ks = [k for k in found[0] if all(k in of for of in found)] if found else []
            if not ks:
                continue
            points = [curve({"k": {k: of[k] for k in ks}}) for of in found]
            curves, shares = ([one[of] for one in points] for of in (what, "share"))
            mean, share = np.mean(curves, axis=0), np.mean(shares, axis=0)
            colour, style = plt.get_cmap("tab20")(2 * number % 20 + number // 10), "-" if "HEMoE" in method else "--"
            axes.plot(share, mean, style, marker="o", ms=3, lw=1.3, color=colour, label=_name(method))
            if len(curves) > 1 and method in ("HEMoE", "random"):
                sd = np.std(curves, axis=0, ddof=1)
                axes.fill_between(share, mean - sd, mean + sd, color=colour, alpha=0.12, lw=0)
        for method, style in zip(DENSE, (":", "-"), strict=True):
            values = [curve(of[method])[what][0] for of in records.values() if method in of]
            if values:
                axes.axhline(np.mean(values), color="0.3", lw=0.9, ls=style, label=_name(method))
        axes.set(xlabel="activated share of the experts' neurons", ylabel=label)
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    save_figure(drawn, folder / "accuracy_by_share.png", dpi=100)
    caption = (
        "Accuracy and loss against the activated share, a line a method: the mean over seeds of points of the same k."
    )
    return {"accuracy_by_share": caption}


WING = Wing("HEMoE", read, tables, draw)
