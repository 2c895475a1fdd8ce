"""Which records may stand in one table: those that have been asked the same."""

from typing import Any

from expert_merging.report.records import Groups


def tasks_of(record: dict[str, Any]) -> set[str]:
    """What a model has been asked."""
    return {task for point in record["k"].values() for task in point["accuracy"]}


def leave_out_unfinished(found: Groups, per_task: str) -> None:
    """Leave out, and say so, who has not been asked all that the same model of another seed, or another tuned for each task,
    has been asked. The names of the latter end in `per_task`."""
    asked: dict[str, set[str]] = {}

    def group(model: str) -> str:
        return per_task if model.endswith(per_task) else model

    for records in found.values():
        for model, record in records.items():
            asked[group(model)] = asked.get(group(model), set()) | tasks_of(record)
    for seed, records in found.items():
        for model in list(records):
            if missing := sorted(asked[group(model)] - tasks_of(records[model])):
                print(f"{seed}/{model} is left out: it has not been asked {missing[0]}")
                del records[model]
