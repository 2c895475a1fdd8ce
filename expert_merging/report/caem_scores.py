"""Tables of scores: the paper's table 2, the merged models before training, every merging method, and what runs cost."""

from collections.abc import Callable
from typing import Any

from expert_merging.merging.registry import METHODS
from expert_merging.report.evidence import Evidence, mean_loss, start_name, starts
from expert_merging.report.tables import Table, stat

# The paper's numbers (tables 2-5), shown beside ours at scale `paper`.
PAPER_SCORES = {
    "Baseline-8": (0.9862, 94.72, 76.50, 29.36), "Baseline-16": (0.9881, 94.33, 76.64, 29.88),
    "CAEM-8": (1.0056, 94.57, 76.51, 31.26), "CAEM-8-to-16": (1.0012, 94.37, 76.90, 31.02),
    "CAEM-16": (1.0007, 94.03, 77.15, 30.98), "CAEM-8-Avg": (0.9986, 94.20, 76.59, 30.68),
    "CAEM-16-Avg": (0.9990, 94.39, 76.58, 30.94),
}  # fmt: skip


def scores(e: Evidence) -> Table:
    """Table 2."""
    kept = len(e.records)
    table = Table(
        "scores", "Test scores (table 2)",
        "Overall: mean over tasks of score / score of the single-task model with as many experts. "
        f"{_seeds(kept)}{_left_out(e)}",
    )  # fmt: skip

    def add(label: str, name: str, test_of: Callable[[Any], Any], overall_of: Callable[[Any], Any]) -> None:
        records = [one for (one,) in e.get(name)]
        if records:
            row: dict[str, Any] = {"configuration": label, "Overall": stat([overall_of(one) for one in records], 4)}
            for task in e.tasks:
                main = e.main_score(task)
                row[f"{task} {main}"] = stat([test_of(one)[task][main] for one in records])
            paper = PAPER_SCORES.get(label)
            if e.scale == "paper":
                columns = ("paper: Overall", *(f"paper: {task}" for task in e.tasks))
                row |= dict(zip(columns, paper or [None] * len(columns), strict=True))
            table.rows.append(row | {"from": e.source(name)})

    reference = f"reference-{e.n}"

    def add_reference(label: str) -> None:
        add(label, reference, lambda r: r["rows"][label]["test"], lambda r: r["rows"][label]["overall"]["test"])

    for label in dict.fromkeys(label for (one,) in e.get(reference) for label in one["rows"]):
        add_reference(label)
    for experts in (e.n, e.m):
        names = [f"single-task-{experts} {task}" for task in e.tasks]
        if found := e.get(*names):
            row = {"configuration": f"single-task models, {experts} experts", "Overall": stat([1.0] * len(found), 4)}
            for number, task in enumerate(e.tasks):
                main = e.main_score(task)
                row[f"{task} {main}"] = stat([one[number][f"{task}_data"]["test"][main] for one in found])
            if e.scale == "paper":
                row |= dict.fromkeys(("paper: Overall", *(f"paper: {task}" for task in e.tasks)))
            table.rows.append(row | {"from": e.source(*names)})
    for name in e.multi_task():
        add(name, name, lambda r: {t: r[f"{t}_data"]["test"] for t in e.tasks}, lambda r: r["overall"]["test"])
    return table


def merged_only(e: Evidence) -> Table:
    """What merging gives before any joint fine-tuning."""
    table = Table(
        "merged_only", "Merged, before the joint fine-tuning",
        "Test scores, and cross-entropy on validation in nats a target token (mean over tasks). "
        "For a Baseline: the pre-trained model.",
    )  # fmt: skip
    for name in e.multi_task():
        start = starts(e, name)
        if start:
            row = {"configuration": name, "Overall": stat([one["overall"]["test"] for one in start], 4)}
            for task in e.tasks:
                main = e.main_score(task)
                row[f"{task} {main}"] = stat([one["test"][task][main] for one in start])
            row["loss"] = stat([mean_loss(one["validation"], e) for one in start], 3)
            table.rows.append(row | {"from": e.source(start_name(e, name))})
    return table


def merging(e: Evidence) -> Table:
    """Why not merge the single-task models directly? Every merging method beside CAEM and the baseline."""
    table = Table(
        "merging", f"Merging the single-task models of {e.n} experts",
        f"Test scores. {_seeds(len(e.records))} `sees`: what a method looks at besides the models; an oracle is a bound, not "
        "a result. `mixed`: Overall when batches hold all tasks, where the routing could depend on the batch. MB of weights "
        "on disk; WEMoE's with the pre-trained model that they build on. Seconds to merge, and to adapt or train.",
    )  # fmt: skip

    def add(
        label: str, sees: str, name: str, records: list[Any], test_of: Callable[[Any], Any], overall: str, **own
    ) -> None:
        row: dict[str, Any] = {"method": label, "sees": sees}
        row["Overall"] = stat([_at(one, overall, "test") for one in records], 4)
        for task in e.tasks:
            main = e.main_score(task)
            row[f"{task} {main}"] = stat([test_of(one)[task][main] for one in records])
        row |= {"mixed": None, "parameters": f"{records[0]['parameters'] / 1e6:.2f}M", "MB": None}
        table.rows.append(row | {"s to merge": None, "s to adapt": None} | own | {"from": e.source(name)})

    for method in METHODS.values():
        name = f"merging-{e.n} {method.name}"
        if records := [one for (one,) in e.get(name)]:
            more = {"MB": stat([one["bytes"] / 1e6 for one in records], 1)}
            more["s to merge"] = stat([one["seconds_to_merge"] for one in records], 1)
            if "adaptation" in records[0]:
                more["s to adapt"] = stat([one["adaptation"]["seconds"] for one in records], 0)
            if "routing" in records[0]:
                more["mixed"] = stat([_at(one, "overall", "mixed") for one in records], 4)
            add(method.label, method.sees, name, records, _test_of(e), "overall", **more)
    if not table.rows:
        return table
    caem, baseline = f"CAEM-{e.n}", f"Baseline-{e.n}"
    if records := [one for (one,) in e.get(caem)]:
        add(f"{caem}, merged", "expert usage", caem, records, lambda one: one["before"]["test"], "before overall")
    for name in (caem, baseline):
        if records := [one for (one,) in e.get(name)]:
            seconds = stat([one["seconds"] for one in records], 0)
            add(
                f"{name}, trained",
                "training examples",
                name,
                records,
                _test_of(e),
                "overall",
                **{"s to adapt": seconds},
            )
    return table


def cost(e: Evidence) -> Table:
    """What a configuration costs beside what it reached."""
    table = Table(
        "cost",
        "Cost",
        "Parameters, epochs run and the best one, and seconds of fine-tuning (with evaluation), a seed each.",
    )
    names = [f"single-task-{x} {task}" for x in (e.n, e.m) for task in e.tasks]
    for name in [*names, *e.multi_task()]:
        if found := [one for (one,) in e.get(name)]:
            row = {
                "run": name,
                "parameters": f"{found[0]['parameters'] / 1e6:.2f}M",
                "epochs": len(found[0]["selection"]),
            }
            row["best epoch"] = ", ".join(str(one["best_epoch"]) for one in found)
            row["seconds"] = stat([one["seconds"] for one in found], 0)
            table.rows.append(row | {"from": e.source(name)})
    return table


def _test_of(e: Evidence) -> Callable[[Any], dict[str, Any]]:
    return lambda one: {task: one[f"{task}_data"]["test"] for task in e.tasks}


def _at(record: Any, path: str, last: str) -> float | None:
    """The number under a path of keys, if it is there: without histories of the single-task models there is no Overall."""
    for key in path.split():
        record = record[key]
    return record.get(last)


def _seeds(number: int) -> str:
    return "One seed." if number == 1 else f"Mean ± standard deviation over {number} seeds."


def _left_out(e: Evidence) -> str:
    """Which single-task scores of 0 Overall cannot divide by, in a sentence."""
    zero = [
        f"{task} ({experts} experts, seed {seed})"
        for experts in (e.n, e.m)
        for task in e.tasks
        for seed, record in e.by_seed(f"single-task-{experts} {task}")
        if record[f"{task}_data"]["test"][e.main_score(task)] == 0
    ]
    return f" Left out, the single-task score being 0: {', '.join(zero)}." if zero else ""
