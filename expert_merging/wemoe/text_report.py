"""Tables and figures of neighbours/WEMoE_text.py from its records: {seed: {"part.method": record}}."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expert_merging.data.text_tasks import Overlap
from expert_merging.merging.registry import METHODS
from expert_merging.report.records import Groups, every, source
from expert_merging.report.tables import Table, stat
from expert_merging.wemoe import text_claims

LABELS = {name: method.label for name, method in METHODS.items()} | {
    "individual": "separate models", "pretrained": "pre-trained, heads only", "multi_task": "multi-task training",
    "adamerging_layer++": "AdaMerging++", "ewemoe_90": "E-WEMoE 90%", "ewemoe_99": "E-WEMoE 99%",
    "wemoe_attention": "WEMoE, attention instead", "wemoe_both": "WEMoE, attention too",
    "wemoe_depth0": "WEMoE, constants", "wemoe_depth1": "WEMoE, linear routers",
}  # fmt: skip
END = "*"  # beside a coefficient


def is_text(groups: Groups) -> bool:
    """Whether records are of texts."""
    return any("part" in record for _, _, record in every(groups))


def tables(groups: Groups) -> list[Table]:
    """All there is to say of the parts that were run."""
    made = [
        accuracy(groups), cost(groups), text_claims.claims(groups, LABELS), coefficients(groups), inputs(groups), guard(groups),
        mixed(groups), generalization(groups), robustness(groups), number(groups), ablation(groups),
    ]  # fmt: skip
    return [table for table in made if table.rows]


# ---------------------------------------------------------------- reading records


def methods_of(groups: Groups, part: str) -> list[str]:
    """The methods of a part, in the order of the script's: references, registry, what adapts."""
    there = {run.split(".", 1)[1] for _, run, _ in every(groups) if run.split(".", 1)[0] == part}
    order = ["individual", "pretrained", "multi_task", *METHODS]
    rank = {name: i for i, name in enumerate(order)}

    def place(method: str) -> tuple[int, int, str]:
        known = max((name for name in order if method.startswith(name)), key=len, default="")
        return rank.get(known, len(order)), len(method), method

    return sorted(there, key=place)


def of(groups: Groups, part: str, method: str) -> list[tuple[str, dict[str, Any]]]:
    """(seed, record) of a method in a part."""
    return [(group, runs[f"{part}.{method}"]) for group, runs in groups.items() if f"{part}.{method}" in runs]


def having(groups: Groups, *parts: str) -> Groups:
    """The seeds that have one of the parts, which not all need have."""
    return {group: runs for group, runs in groups.items() if any(run.startswith(parts) for run in runs)}


def tasks_of(groups: Groups) -> list[str]:
    """The tasks that are merged in the part main."""
    return next((list(record["tasks"]) for _, _, record in every(groups) if record["part"] == "main"), [])


def mean(record: dict[str, Any], names: Sequence[str], key: str = "") -> float:
    """Mean accuracy (%) over tasks; `key` says where in the record they stand."""
    place = record[key] if key else record
    return 100 * float(np.mean([place[name]["accuracy"] for name in names]))


def relative(groups: Groups, group: str, record: dict[str, Any], names: Sequence[str]) -> float | None:
    """Mean over tasks of accuracy over that of the separate model of the same seed (%); None where that is not there or 0."""
    single = groups[group].get("main.individual")
    if single is None or any(name not in single or not single[name]["accuracy"] for name in names):
        return None
    return 100 * float(np.mean([record[name]["accuracy"] / single[name]["accuracy"] for name in names]))


def label(method: str) -> str:
    return LABELS.get(method, method)


def _facts(groups: Groups) -> str:
    identity = next(record["identity"] for _, _, record in every(groups))
    seeds = [group.removeprefix("seed") for group in groups]
    spread = f"mean ± standard deviation over seeds {', '.join(seeds)}" if len(seeds) > 1 else f"seed {seeds[0]} alone"
    return (
        f"{spread}; {identity['train_texts'] or 'all'} training examples a task and seed, "
        f"{identity['test_texts'] or 'all'} test examples a task at most"
    )


def _overlaps(groups: Groups, trained: Sequence[str], tested: Sequence[str]) -> str:
    """What a note says of test texts that other tasks' models were trained on; older records do not tell."""
    told = [Overlap(*one) for one in next((r["overlaps"] for _, _, r in every(groups) if "overlaps" in r), ())]
    told = [one for one in told if one.trained in trained and one.tested in tested]
    return f" Tasks share texts: {'; '.join(map(str, told))}." if told else ""


# ---------------------------------------------------------------- tables


def accuracy(groups: Groups) -> Table:
    note = (
        f"Test accuracy (%), {_facts(groups)}. Relative: mean over tasks of accuracy / that of the separate model. "
        "Coefficients chosen on validation by one rule; what adapts has seen the test inputs without labels."
    )
    names = tasks_of(groups)
    table = Table("accuracy", "Merging a real encoder", note + _overlaps(groups, names, names))
    for method in methods_of(groups, "main"):
        found = of(groups, "main", method)
        row: dict[str, Any] = {"method": label(method), "mean": stat([mean(record, names) for _, record in found])}
        row["relative"] = stat([relative(groups, group, record, names) for group, record in found])
        row |= {name: stat([100 * record[name]["accuracy"] for _, record in found], 1) for name in names}
        table.rows.append(row | {"from": source(groups, f"main.{method}")})
    return table


def cost(groups: Groups) -> Table:
    note = "Parameters with task vectors as if dense; those not zero; megabytes in memory; seconds on the records' machine."
    table = Table("cost", "Size and time", note)
    for method in methods_of(groups, "main"):
        found = [record for _, record in of(groups, "main", method)]
        info, seconds = found[0]["model_info"], [record.get("seconds", {}) for record in found]
        table.rows.append({
            "method": label(method), "trained": info["trainable_params"], "parameters": info["all_params"],
            "not zero": info["effective_params"], "MB": f"{info['bytes'] / 1e6:.1f}",
            **{f"s to {key}": stat([one.get(key) for one in seconds], 1) for key in ("merge", "adapt", "evaluate")},
            "from": source(groups, f"main.{method}"),
        })  # fmt: skip
    return table


def coefficients(groups: Groups) -> Table:
    table, names = Table("coefficients", "Coefficients", ""), tasks_of(groups)
    defaults = methods_of(groups, "defaults")
    for method in methods_of(groups, "main"):
        chosen, default = of(groups, "main", method), of(groups, "defaults", method)
        if not any("coefficient" in record for _, record in chosen):
            continue
        row: dict[str, Any] = {"method": label(method), "chosen": " ".join(_chosen(record) for _, record in chosen)}
        row["relative"] = stat([relative(groups, group, record, names) for group, record in chosen])
        if defaults:
            row["default"] = f"{default[0][1]['coefficient']:g}" if default else ""
            row["relative at default"] = stat([relative(groups, group, record, names) for group, record in default])
            row["chosen - default"] = text_claims.difference(groups, f"main.{method}", f"defaults.{method}")
            row["its seeds"] = " ".join(group.removeprefix("seed") for group, _ in default)
        runs = [f"main.{method}", *([f"defaults.{method}"] if default else [])]
        table.rows.append(row | {"from": "; ".join(source(groups, run) for run in runs)})
    table.note = "Relative accuracy (%) with the coefficient that validation chose, a seed each" + (
        ", and with the method's own default, of the seeds that have run it. The difference is of mean accuracy (points), "
        "within these seeds: [95% interval, as in claims; of one seed over examples alone], uncorrected"
        if defaults
        else ""
    )
    table.note += ". What adapts takes task arithmetic's."
    if any(END in row["chosen"] for row in table.rows):
        table.note += f" {END}: an end of the grid, beyond which a better one may lie."
    return table


def _chosen(record: dict[str, Any]) -> str:
    tried = [value for value, _ in record["curve"]]
    return f"{record['coefficient']:g}{END if record['coefficient'] in (min(tried), max(tried)) else ''}"


def inputs(groups: Groups) -> Table:
    note = "Mean test accuracy (%) of what adapts to the unlabelled test inputs, as in the papers, and to validation inputs."
    table, names = Table("inputs", "Adapted to test or to validation inputs", note), tasks_of(groups)
    for method in methods_of(groups, "validation"):
        both = [of(groups, part, method) for part in ("main", "validation")]
        pairs = [(a[1], b[1]) for a in both[0] for b in both[1] if a[0] == b[0]]
        table.rows.append({
            "method": label(method), "test inputs": stat([mean(a, names) for a, _ in pairs]),
            "validation inputs": stat([mean(b, names) for _, b in pairs]),
            "difference": stat([mean(b, names) - mean(a, names) for a, b in pairs]),
            "from": source(groups, f"main.{method}", f"validation.{method}"),
        })  # fmt: skip
    return table


def guard(groups: Groups) -> Table:
    note = (
        "Mean test accuracy (%) with the guard of the part main and with rolling back. Lowest: the least entropy of a task's "
        "mean prediction while adapting, as a share of its first. Where the guard never spoke up the two are one run."
    )
    table, names = Table("guard", "The collapse guard", note), tasks_of(groups)
    for method in methods_of(groups, "guard"):
        pairs = [(a[1], b[1]) for a in of(groups, "main", method) for b in of(groups, "guard", method) if a[0] == b[0]]
        lowest = [min(v / own[0] for own in a["adaptation"]["marginal_entropy"].values() if own and own[0] for v in own)
                  for a, _ in pairs if any(a["adaptation"]["marginal_entropy"].values())]  # fmt: skip
        table.rows.append({
            "method": label(method), "main": stat([mean(a, names) for a, _ in pairs]),
            "rollback": stat([mean(b, names) for _, b in pairs]), "lowest": stat(lowest),
            "runs in which it spoke up": sum(bool(a["adaptation"]["collapsed"]) for a, _ in pairs), "runs": len(pairs),
            "from": source(groups, f"main.{method}", f"guard.{method}"),
        })  # fmt: skip
    return table


def mixed(groups: Groups) -> Table:
    note = (
        "Mean test accuracy (%) in batches of one task and in batches of all tasks' texts; of what routes by batch also the "
        "same weights routed sample by sample."
    )
    table, names = Table("mixed", "Batches of one task and mixed ones", note), tasks_of(groups)
    for part in ("main", "mixed"):
        for method in methods_of(groups, part):
            found = [record for _, record in of(groups, part, method) if "mixed" in record]
            if found:
                by_sample = [mean(record, names, "sample_wise") for record in found if "sample_wise" in record]
                table.rows.append({
                    "method": label(method), "one task": stat([mean(record, names) for record in found]),
                    "mixed": stat([mean(record, names, "mixed") for record in found]),
                    "sample by sample": stat(by_sample), "from": source(groups, f"{part}.{method}"),
                })  # fmt: skip
    return table


def generalization(groups: Groups) -> Table:
    first = next((record for _, _, record in every(groups) if record["part"] == "generalization"), None)
    if first is None:
        return Table("generalization", "", "")
    seen, unseen = first["tasks"], first["unseen"]
    note = f"Test accuracy (%) after merging {', '.join(seen)}; {', '.join(unseen)} are only tested, each under its own head."
    if {"mr", "sst2"} <= {*seen, *unseen} or {"mr", "sst5"} <= {*seen, *unseen}:
        note += " MR's sentences are largely SST's."
    if {"sst2", "sst5"} <= {*seen, *unseen}:
        note += " SST-5's sentences are SST-2's and the neutral ones."
    note += _overlaps(groups, seen, unseen)
    table = Table("generalization", "Tasks that were not merged", note)
    for method in methods_of(groups, "generalization"):
        found = [record for _, record in of(groups, "generalization", method)]
        row = {"method": label(method), "merged": stat([mean(record, seen) for record in found])}
        row |= {"not merged": stat([mean(record, unseen) for record in found])}
        row |= {name: stat([100 * record[name]["accuracy"] for record in found], 1) for name in unseen}
        table.rows.append(row | {"from": source(groups, f"generalization.{method}")})
    return table


def robustness(groups: Groups) -> Table:
    note = (
        "Mean test accuracy (%) over tasks, texts spoilt in four ways at two strengths; the models are the part main's, what "
        "adapts has seen clean texts. A model that reads no case sees nothing of the changes of case."
    )
    table = Table("robustness", "Spoilt texts", note)
    for method in methods_of(groups, "robustness"):
        found = [record["corrupted"] for _, record in of(groups, "robustness", method)]
        row: dict[str, Any] = {"method": label(method)}
        for way in found[0]:
            row[way.replace("_", " ")] = stat([100 * float(np.mean(list(record[way].values()))) for record in found], 1)
        table.rows.append(row | {"from": source(groups, f"robustness.{method}")})
    return table


def number(groups: Groups) -> Table:
    table = Table(
        "number", "Number of tasks", "Relative test accuracy (%) over the first 2, 3, .. tasks, when these are merged."
    )
    points, groups = curves(groups), having(groups, "number")
    for method, by_number in points.items():
        row: dict[str, Any] = {"method": label(method)}
        runs = []
        for count in sorted({n for one in points.values() for n in one}):
            row[f"{count} tasks"] = stat(by_number.get(count, []))
            runs += [run for run in (f"number{count}.{method}",) if any(run in of_seed for of_seed in groups.values())]
        table.rows.append(row | {"from": source(groups, *runs, f"main.{method}")})
    return table


def curves(groups: Groups) -> dict[str, dict[int, list[float | None]]]:
    """{method: {number of tasks: relative accuracy (%) of each seed}}"""
    groups = having(groups, "number")
    parts = sorted({record["part"] for _, _, record in every(groups) if record["part"].startswith("number")})
    if not parts:
        return {}
    found: dict[str, dict[int, list[float | None]]] = {}
    for method in methods_of(groups, parts[0]):
        for part in (*parts, "main"):
            for group, record in of(groups, part, method):
                value = relative(groups, group, record, record["tasks"])
                found.setdefault(method, {}).setdefault(len(record["tasks"]), []).append(value)
    return found


def ablation(groups: Groups) -> Table:
    note = "Mean test accuracy (%) and relative accuracy: which modules are routed, and how deep the routers are (2 in WEMoE)."
    table, names = Table("ablation", "What is routed, and by what", note), tasks_of(groups)
    groups = having(groups, "modules", "depth")
    rows = [(part, method) for part in ("modules", "depth") for method in methods_of(groups, part)]
    if rows and of(groups, "main", "wemoe"):
        rows = [("main", "wemoe"), *rows]
    for part, method in rows:
        found = of(groups, part, method)
        info = found[0][1]["model_info"]
        table.rows.append({
            "method": label(method), "mean": stat([mean(record, names) for _, record in found]),
            "relative": stat([relative(groups, group, record, names) for group, record in found]),
            "trained": info["trainable_params"], "parameters": info["all_params"],
            "from": source(groups, f"{part}.{method}"),
        })  # fmt: skip
    return table


# ---------------------------------------------------------------- figures


def draw(groups: Groups, folder: Path) -> dict[str, str]:
    """Draw accuracy, the number of tasks, robustness, routing and adaptation, as far as they were run, into `folder`; returns
    {name of a figure: caption}."""
    from expert_merging.wemoe import figures, text_figures

    captions: dict[str, str] = {}

    def make(name: str, caption: str, drawing: Callable[..., None], *shown: Any) -> None:
        drawing(*shown, folder / f"{name}.png")
        captions[name] = caption

    main = {method: dict(of(groups, "main", method)) for method in methods_of(groups, "main")}
    if main:
        by_label = {label(method): found for method, found in main.items()}
        make("accuracy", "Mean accuracy by method, dots the seeds.", figures.accuracy, by_label)
    if points := curves(groups):
        caption = "Relative accuracy against the number of tasks merged, bars the seeds' range."
        make("number", caption, text_figures.number, {label(method): one for method, one in points.items()})
    spoilt = {
        label(m): [r["corrupted"] for _, r in of(groups, "robustness", m)] for m in methods_of(groups, "robustness")
    }
    if spoilt:
        make("robustness", "Mean accuracy on spoilt texts.", text_figures.robustness, spoilt)
    curve_of = {label(m): [r["curve"] for r in found.values() if "curve" in r] for m, found in main.items()}
    curve_of = {name: found for name, found in curve_of.items() if found}
    if curve_of:
        caption = "Relative accuracy on validation against the coefficient, mean over seeds."
        make("coefficients", caption, text_figures.coefficients, curve_of)
    for method, found in main.items():
        if any("routing_weights" in record for record in found.values()):
            caption = f"{label(method)}: mean routing weights by the task of the text."
            make(f"routing_{method}", caption, figures.routing, label(method), found)
        if any(record.get("adaptation") for record in found.values()):
            caption = f"{label(method)}: what is minimised, and the entropy of the mean prediction."
            make(f"adaptation_{method}", caption, figures.adaptation, label(method), found)
    return captions
