"""Accuracy against activated share: records of all seeds, tables that follow from them, and the figure."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy import stats

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder, read_json, write_atomic, write_json
from expert_merging.hemoe.pipeline import DENSE, METHODS
from expert_merging.report.tables import Table, stat
from expert_merging.run.provenance import ROOT

RESULTS = ROOT / "results" / "hemoe"
SHARES = (0.25, 0.5, 0.75)  # at which curves are compared
_LABELS = {
    "dense": "dense, as it is", "dense_tuned": "dense, tuned alike", "HEMoE": "HEMoE, neurons",
    "HEMoE_start": "HEMoE, routers from the map", "HEMoE_gate": "HEMoE, EMoE's routers", "HEMoE_modules": "HEMoE, modules",
    "HEMoE_equal": "HEMoE, equal sizes", "MoEBERT_domains": "MoEBERT, an expert a domain",
    "random": "random, equal sizes", "random_heterogeneous": "random, HEMoE's sizes",
}  # fmt: skip
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
)
Records = dict[int, dict[str, dict[str, Any]]]  # seed -> method -> record


def make(c: SimpleNamespace) -> None:
    """Write HEMOE_DIR/report from every seed there, print the tables; `publish` copies it to results/hemoe.

    Raises UserError where no model has been measured and evaluated.
    """
    folder = Path(c.HEMOE_DIR) / "report"
    with new_folder(folder) as place:
        for path in sorted(Path(c.HEMOE_DIR).glob("seed*")):
            for method in (*DENSE, *METHODS):
                if record := _collected(path, method):
                    write_json(place / "records" / path.name / f"{method}.json", record)
        found = write(place)
    for table in found:
        print(table.markdown())
    print(f"records, tables and figure: {folder}")
    if c.publish:
        from expert_merging.report.publish import filled

        with new_folder(RESULTS) as place:
            shutil.copytree(folder, place, dirs_exist_ok=True)
        page = ROOT / "docs" / "hemoe.md"
        if page.exists():
            write_atomic(page, filled(page.read_text(encoding="utf-8"), ROOT))


def write(folder: Path) -> list[Table]:
    """Write tables/ and accuracy_by_share.png into `folder` from its records/; returns the tables."""
    records = read(folder)
    found = tables(records)
    for table in found:
        for ending, text in _texts(table).items():
            write_atomic(folder / "tables" / f"{table.name}.{ending}", text)
    figure(records, folder / "accuracy_by_share.png")
    return found


def check() -> None:
    """Raises UserError where a table under results/hemoe is not what its records give."""
    for table in tables(read(RESULTS)):
        for ending, text in _texts(table).items():
            path = RESULTS / "tables" / f"{table.name}.{ending}"
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                raise UserError(f"{path.relative_to(ROOT)} does not follow from the records beside it")
    print("the tables of results/hemoe follow from their records")


def read(folder: Path) -> Records:
    """The records of a report. Raises UserError where there are none."""
    records: Records = {}
    for path in sorted((folder / "records").glob("seed*")):
        found = {method: path / f"{method}.json" for method in (*DENSE, *METHODS)}
        records[int(path.name[4:])] = {name: read_json(file) for name, file in found.items() if file.exists()}
    if not any(records.values()):
        raise UserError(f"{folder} has no records: run the steps measure and evaluation first")
    return records


def _collected(folder: Path, method: str) -> dict[str, Any] | None:
    """What a run of one method found, in one record; None where it has not been measured and evaluated."""
    parts = {name: folder / method / f"{name}.json" for name in ("split", "tuning", "measure", "evaluation")}
    there = {name: read_json(path) for name, path in parts.items() if path.exists()}
    if not {"measure", "evaluation"} <= there.keys():
        return None
    last = there["evaluation"]
    ks = sorted(there["measure"]["k"].keys() & last["k"].keys(), key=int)
    return {
        **{name: last[name] for name in ("command", "versions", "seed", "identity")}, "method": method,
        "split": there.get("split", {}).get("split"), "training": there.get("tuning", {}).get("training"),
        "k": {k: {**there["measure"]["k"][k], "accuracy": last["k"][k]} for k in ks},
    }  # fmt: skip


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


def tables(records: Records) -> list[Table]:
    """What there is to say, from the records alone."""
    return [*filter(None, (_at_shares(records), _questions(records))), _points(records), _splits(records)]


def _at_shares(records: Records) -> Table:
    note = "Mean over tasks of 0-shot accuracy (%) by lm_eval, and of the loss of held-out answers (nats a token), at equal"
    table = Table(
        "accuracy_at_share", "Accuracy at equal activated share",
        f"{note} activated shares of the experts' neurons, between measured points by straight lines; {_seeds(records)}.",
    )  # fmt: skip
    for method in (*DENSE, *METHODS):
        if not any(method in of_seed for of_seed in records.values()):
            continue
        row: dict[str, Any] = {"model": _LABELS.get(method, method)}
        for what, decimals in (("accuracy", 2), ("loss", 3)):
            for share in (*SHARES, 1.0):
                values = [_value(one[method], what, share) for one in records.values() if method in one]
                row[f"{what} at {share:g}"] = stat(values, decimals)
        table.rows.append({**row, "from": f"{method}.json of each seed"})
    return table


def _value(record: dict[str, Any], what: str, share: float) -> float | None:
    if share == 1.0 and record["k"]:  # all neurons, or as many as its experts have when all fire
        points = curve(record)
        return float(points[what][-1]) if points["share"][-1] > 0.999 else None
    return at(record, what, share)


def _questions(records: Records) -> Table | None:
    table = Table(
        "gains", "Where the gain comes from",
        "Difference of two curves, mean over the activated shares that both cover: accuracy in points (more is better), "
        "loss in nats (less is better); mean over seeds [95% interval by Student's t] (each seed).",
    )  # fmt: skip
    for question, one, other in _QUESTIONS:
        pairs = [(of[one], of[other]) for of in records.values() if one in of and other in of]
        if pairs:
            row: dict[str, Any] = {"question": question, "difference": f"{_name(one)} - {_name(other)}"}
            for what, decimals in (("accuracy", 2), ("loss", 4)):
                row[what] = _interval([mean_difference(*pair, what) for pair in pairs], decimals)
            table.rows.append({**row, "from": f"{one}.json, {other}.json of each seed"})
    return table if table.rows else None


def _interval(values: list[float], decimals: int) -> str:
    each = ", ".join(f"{value:+.{decimals}f}" for value in values)
    mean = np.mean(values)
    if len(values) < 2:
        return f"{mean:+.{decimals}f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:+.{decimals}f} [{mean - half:+.{decimals}f}, {mean + half:+.{decimals}f}] ({each})"


def _points(records: Records) -> Table:
    table = Table(
        "points", "Every measured point",
        f"k experts fire; share of the experts' neurons and of all parameters that is activated; {_seeds(records)}.",
    )  # fmt: skip
    for method in (*DENSE, *METHODS):
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
                    "from": f"{method}.json of each seed",
                }
            )  # fmt: skip
    return table


def _splits(records: Records) -> Table:
    table = Table(
        "splits", "The partitions",
        "Sizes of the experts over all neurons, ascending, mean over layers and seeds; of the solver: objective over its "
        "proved bound, mean over layers and seeds.",
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
                    "from": f"{method}.json of each seed",
                }
            )  # fmt: skip
    return table


def _name(method: str) -> str:
    return _LABELS.get(method, method)


def _seeds(records: Records) -> str:
    return f"mean ± standard deviation over seeds {', '.join(map(str, records))}" if len(records) > 1 else "one seed"


def _texts(table: Table) -> dict[str, str]:
    return {"md": table.markdown(), "csv": table.csv(), "tex": table.latex()}


def figure(records: Records, path: Path) -> None:
    """Accuracy and loss against the activated share, a line a method: the mean over seeds of points of the same k."""
    from expert_merging.report.figures import plt, save_figure

    drawn, panels = plt.subplots(1, 2, figsize=(9.5, 4))
    for axes, what, label in zip(panels, ("accuracy", "loss"), ("accuracy, %", "loss, nats a token"), strict=True):
        for number, method in enumerate(METHODS):
            curves = [curve(of[method])[what] for of in records.values() if method in of]
            shares = [curve(of[method])["share"] for of in records.values() if method in of]
            if not curves:
                continue
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
    save_figure(drawn, path, dpi=100)
