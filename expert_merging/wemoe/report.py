"""Records of merged classifiers on disk, and the tables and figures made of them.

A run leaves records/{group}/{method}.json; a group is a seed, or what a corruption or a set of tasks is called.

python -m expert_merging.wemoe.report results/wemoe                                 # again, from the records there
python -m expert_merging.wemoe.report results/wemoe/digits runs/tiny/wemoe_digits   # after publishing a run's there
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.merging.registry import FROM_WEIGHTS, METHODS
from expert_merging.report import folders, index, publish
from expert_merging.report.folders import Wing
from expert_merging.report.records import every, joined, published, refuse_unlike, source
from expert_merging.report.records import read as read_groups
from expert_merging.report.tables import Table, stat
from expert_merging.run.provenance import ROOT
from expert_merging.wemoe import text_report

RESULTS = ROOT / "results" / "wemoe"

MORE = ("model_info", "routing_weights", "mixed", "sample_wise", "adaptation", "seconds", "files")


def seen_and_unseen(found: dict[str, Any], tasks: Sequence[str], unseen: Sequence[str]) -> dict[str, float]:
    """Mean accuracy over the tasks that were merged and over those that were not."""
    means: dict[str, float] = {}
    for key, names in (("seen_accuracy", [t for t in tasks if t not in unseen]), ("unseen_accuracy", unseen)):
        values = [found[name]["accuracy"] for name in names if name in found]
        means |= {key: sum(values) / len(values)} if values else {}
    return means


def line(found: dict[str, Any]) -> str:
    """A record in a line."""
    if "corrupted" in found:
        means = {way: 100 * sum(of_task.values()) / len(of_task) for way, of_task in found["corrupted"].items()}
        return ", ".join(f"{value:.1f} {way}" for way, value in means.items())
    parts = [f"{100 * found['average_accuracy']:.2f} in batches of one task"]
    parts += [f"{100 * found[key]['average_accuracy']:.2f} {label}" for key, label in
              (("mixed", "in mixed batches"), ("sample_wise", "sample by sample")) if key in found]  # fmt: skip
    return ", ".join(parts)


def read(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """{method: {group: record}} in the order of their kinds. Raises UserError where there are none."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for group, method, record in every(read_groups(Path(folder))):
        found.setdefault(method, {})[group] = record
    with_statistics = [name for name, method in METHODS.items() if method.statistics]
    order = ("pretrained", "individual", *FROM_WEIGHTS, *with_statistics, "adamerging", "wemoe", "ewemoe")
    rank = {method: min(i for i, kind in enumerate(order) if method.startswith(kind)) for method in found}
    return {method: found[method] for method in sorted(found, key=lambda m: (rank[m], len(m), m))}


def tasks_of(records: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """The tasks that records have scores of, in order."""
    names: dict[str, None] = {}
    for of_method in records.values():
        for record in of_method.values():
            names |= {n: None for n, v in record.items() if n not in MORE and isinstance(v, dict) and "accuracy" in v}
    return list(names)


def _rows(records: dict[str, dict[str, dict[str, Any]]]):
    """(name of a row, its records, where they are): seeds together, other groups, such as corruptions, a row each."""
    for method, of_method in records.items():
        seeds = {group: record for group, record in of_method.items() if group.startswith("seed")}
        if seeds:
            runs = {group: {method: record} for group, record in seeds.items()}
            yield method, list(seeds.values()), source(runs, method)
        for group, record in of_method.items():
            if not group.startswith("seed"):
                yield f"{method}, {group}", [record], source({group: {method: record}}, method)


def tables(records: dict[str, dict[str, dict[str, Any]]]) -> list[Table]:
    """Accuracy, and what it costs; a number over groups (seeds) is their mean and standard deviation."""
    names = tasks_of(records)
    note = (
        "Top-1 accuracy in percent on test images, of which methods that adapt have seen the pixels. Mixed: batches of "
    )
    note += "all tasks' images; same weights, sample-wise: of a model adapted with routing by batch."
    accuracy = Table("accuracy", "Accuracy", note)
    cost = Table("cost", "Size and time", "Parameters with task vectors as if dense; those not zero; bytes in memory.")
    for method, found, origin in _rows(records):

        def percent(*path: str, found=found):
            values = []
            for record in found:
                for key in path:
                    record = record.get(key) if record is not None else None
                values.append(None if record is None else 100 * record)
            return stat(values)

        row = {"method": method, "average": percent("average_accuracy"), "mixed": percent("mixed", "average_accuracy")}
        for key in ("seen_accuracy", "unseen_accuracy"):
            if any(key in record for of_method in records.values() for record in of_method.values()):
                row[key.split("_")[0]] = percent(key)
        row["same weights, sample-wise"] = percent("sample_wise", "average_accuracy")
        accuracy.rows.append(row | {name: percent(name, "accuracy") for name in names} | {"from": origin})
        info, seconds = found[0]["model_info"], [record.get("seconds", {}) for record in found]
        cost.rows.append({
            "method": method, "trained": info["trainable_params"], "parameters": info["all_params"],
            "not zero": info["effective_params"], "bytes": info["bytes"],
            **{f"seconds to {key}": stat([one.get(key) for one in seconds], 1) for key in ("merge", "adapt", "evaluate")},
            "from": origin,
        })  # fmt: skip
    return [accuracy, cost]


def draw(records: dict[str, dict[str, dict[str, Any]]], folder: Path) -> dict[str, str]:
    """Draw accuracy, and each method's routing and adaptation, into `folder`; returns {name of a figure: caption}."""
    from expert_merging.wemoe import figures
    from expert_merging.wemoe.classification import sweep_of

    captions = {"accuracy": "Average accuracy by method, dots the seeds."}
    figures.accuracy(records, folder / "accuracy.png")
    sweep = {kind: own for kind, own in sweep_of(records).items() if len(own) > 2}
    if sweep:
        captions["pruning"] = (
            "Average accuracy, and bytes in memory, against the share of each task vector that is dropped."
        )
        figures.pruning(records, sweep, folder / "pruning.png")
    for method, of_method in records.items():
        if any("routing_weights" in record for record in of_method.values()):
            captions[f"routing_{method}"] = f"{method}: mean routing weights by the task of the input."
            figures.routing(method, of_method, folder / f"routing_{method}.png")
        if any(record.get("adaptation") for record in of_method.values()):
            captions[f"adaptation_{method}"] = f"{method}: what is minimised, and the entropy of the mean prediction."
            figures.adaptation(method, of_method, folder / f"adaptation_{method}.png")
    return captions


def _read_any(folder: Path) -> Any:
    groups = read_groups(Path(folder))
    return groups if text_report.is_text(groups) else read(folder)


def _of_text(found: dict[str, dict[str, Any]]) -> bool:
    """Whether `_read_any` has read groups of runs, as there are of texts, or methods of groups."""
    return any("part" in record for runs in found.values() for record in runs.values())


WING = Wing(
    "WEMoE", _read_any, lambda found: text_report.tables(found) if _of_text(found) else tables(found),
    lambda found, folder: text_report.draw(found, folder) if _of_text(found) else draw(found, folder),
)  # fmt: skip


def write(folder: Path) -> str:
    """Write tables, figures and page into `folder` from the records there; returns the first table."""
    return publish.write(Path(folder), WING)[0].markdown()


def write_text(c: SimpleNamespace) -> str:
    """Likewise for WEMOE_TEXT_DIR, and into results/wemoe/text where `publish` says so, where it joins what was published from
    elsewhere; returns all tables but those of size and time.

    Raises UserError where what was published was made with other constants.
    """
    folder, there = Path(c.WEMOE_TEXT_DIR), RESULTS / "text"
    made = publish.write(folder, WING)
    if c.publish:
        found = joined(published(there), read_groups(folder))
        refuse_unlike(found, "WEMOE_TEXT_DIR")
        publish.publish({there: found}, WING)
    return "\n".join(table.markdown() for table in made if table.name != "cost")


def check() -> None:
    """Raises UserError where a table under results/wemoe is not what its records give."""
    if wrong := [line for folder in index.folders(RESULTS) for line in folders.check(folder, WING)]:
        raise UserError(f"{RESULTS.relative_to(ROOT)} does not follow from its records: {'; '.join(wrong)}")
    print("the tables of results/wemoe follow from their records")


if __name__ == "__main__":
    publish.command(WING, lambda run: {".": read_groups(run)}, sys.argv[1:])
