"""Do calibrated routers mend a merge? The same merges with and without, before and after the joint fine-tuning."""

from dataclasses import replace
from statistics import fmean
from typing import Any

from expert_merging.experiment.grid import CALIBRATED
from expert_merging.report.caem_contrasts import by_interval, compared, seeds_of
from expert_merging.report.evidence import Evidence
from expert_merging.report.tables import Table, stat

_NOTE = (
    "Each router fitted to the sources' choices on unlabelled validation inputs, all else fixed (docs/merging.md). Overall on "
    "test as merged and calibrated, and what calibration adds within seeds: mean [95% interval, bootstrap crossed over seeds "
    "and test examples], by the interval alone, uncorrected: no contrast of docs/protocol.md. Agreement: the share of tokens "
    "sent where the source would, of the experts that are left, before to after, mean over layers and seeds."
)
_MERGED = ", merged"  # behind a run's name: its model before the joint fine-tuning


def calibration(e: Evidence) -> Table:
    """Two rows a merge, as far as the runs are there with each example's score: merged only, and after fine-tuning."""
    table = Table("calibration", "Calibrated routers", _NOTE)
    both = _with_merged(e)
    names = [(f"{case}-{e.n}", when) for case in CALIBRATED for when in (_MERGED, "")]
    pairs = [(f"{name}-calibrated{when}", f"{name}{when}") for name, when in names]
    names = [name for name, pair in zip(names, pairs, strict=True) if seeds_of(both, *pair)]
    pairs = [pair for pair in pairs if seeds_of(both, *pair)]
    found = compared(both, pairs, ("Overall", *e.tasks))
    for number, (name, when) in enumerate(names):
        runs = [e.records[seed] for seed in seeds_of(both, *pairs[number])]
        records = [(of_seed[name], of_seed[f"{name}-calibrated"]) for of_seed in runs]
        row: dict[str, Any] = {"merge": name, "when": "merged only" if when else "fine-tuned", "seeds": len(records)}
        for place, label in enumerate(("as merged", "calibrated")):
            scored = [one[place]["before"] if when else one[place] for one in records]
            row[label] = stat([one["overall"]["test"] for one in scored], 4)
        for measure, of_pairs in found.items():
            difference, verdict = by_interval(of_pairs[number][0], 4 if measure == "Overall" else 2)
            row |= {f"{measure}, added": difference} | ({"verdict": verdict} if measure == "Overall" else {})
        row["agreement"] = _agreement([fitted for _, fitted in records])
        table.rows.append(row | {"from": e.source(name, f"{name}-calibrated")})
    return table


def _with_merged(e: Evidence) -> Evidence:
    """The evidence with the merged models' scores as runs of their own, where each example's is there."""
    records: dict[int, dict[str, Any]] = {}
    for seed, of_seed in e.records.items():
        records[seed] = dict(of_seed)
        for name, record in of_seed.items():
            if each := record.get("before", {}).get("test_each"):
                of_tasks = {f"{task}_data": {"test_each": each[task]} for task in e.tasks}
                records[seed][name + _MERGED] = {"tasks": list(e.tasks), **of_tasks}
    return replace(e, records=records)


def _agreement(records: list[Any]) -> str:
    near = [layer["agreement"] for record in records for layer in record["calibration"].values()]
    before, after = (fmean(of_time) for of_time in zip(*near, strict=True))
    return f"{before:.2f} to {after:.2f}"
