"""The evidence for CAEM: the records of reproduce_tables.py's runs, and what the tables and figures ask of them.

Imports no model: whoever has the files can make the tables again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json, write_atomic, write_json
from expert_merging.experiment.grid import CALIBRATED, POOLED_CASES
from expert_merging.report import records
from expert_merging.report.records import Groups
from expert_merging.run import results

# In the identity of a run what differs from seed to seed, and the base, of which there is a line of its own.
_OF_SEED = ("seed", "goals", "sources", "usage", "weights", "starts", "imported", "ancestor", "base")


@dataclass(frozen=True)
class Evidence:
    """Records by seed and run: {seed: {name: JSON}}; `n` and `m` are few and many experts (8 and 16)."""

    scale: str
    n: int
    m: int
    tasks: tuple[str, ...]
    records: dict[int, dict[str, Any]]

    def get(self, *names: str) -> list[list[Any]]:
        """For each seed that has all of these runs, their records."""
        return [[of_seed[name] for name in names] for of_seed in self.records.values() if set(names) <= of_seed.keys()]

    def source(self, *names: str) -> str:
        """The records of these runs, for a table's column "from"."""
        return records.source(self.groups(), *names)

    def groups(self) -> Groups:
        """The records by seed's file and run."""
        return {f"seed{seed}": of_seed for seed, of_seed in self.records.items()}

    def by_seed(self, name: str) -> list[tuple[int, Any]]:
        """(seed, record) of a run."""
        return [(seed, of_seed[name]) for seed, of_seed in self.records.items() if name in of_seed]

    def multi_task(self) -> list[str]:
        """The multi-task runs that are there, in the order of the paper's table 2, then the controls."""
        n, m = self.n, self.m
        order = [f"Baseline-{n}", f"Baseline-{m}", f"CAEM-{n}", f"CAEM-{n}-to-{m}", f"CAEM-{m}", f"CAEM-{n}-Avg"]
        order += [f"CAEM-{m}-Avg", f"Average-{n}", f"Baseline-{n}-same-compute"]
        order += [f"{case}-{n}" for case in POOLED_CASES]
        order += [f"{case}-{n}-calibrated" for case in CALIBRATED]
        return [name for name in order if self.get(name)]

    def pairs(self) -> list[str]:
        """The pairs of models that were compared."""
        return list(dict.fromkeys(name for of_seed in self.records.values() for name in of_seed if " + " in name))

    @property
    def stacks(self) -> tuple[str, ...]:
        """The models' stacks with experts: of a Switch Transformer encoder and decoder, of a causal mixture one."""
        used = (
            record["usage"] for of_seed in self.records.values() for record in of_seed.values() if "usage" in record
        )
        return tuple(next(used, ("encoder", "decoder")))

    def main_score(self, task: str) -> str:
        """The name of a task's main score."""
        return next(
            record[f"{task}_data"]["main_score"]
            for of_seed in self.records.values()
            for record in of_seed.values()
            if f"{task}_data" in record
        )


def collect(
    folder: Path,
    scale: str,
    sizes: tuple[int, int],
    tasks: tuple[str, ...],
    files: dict[int, dict[str, Path]],
    times: Path | None = None,
    earlier: Path | None = None,
) -> None:
    """Write the results of runs, {seed: {name: file}}, as they are, into `folder` as the records of a report.

    Args:
        sizes: few and many experts.
        times: the file in which the seconds that each run took are noted, if there is one.
        earlier: a report's folder, if it is there, whose seeds and runs join those that are new: what was published from
            another machine, say.
    """
    kept = records.read(earlier) if earlier is not None and (earlier / "experiment.json").exists() else {}
    new = {f"seed{seed}": {name: read_json(path) for name, path in of_seed.items()} for seed, of_seed in files.items()}
    groups = records.joined(kept, new)
    seeds = sorted(int(group.removeprefix("seed")) for group in groups)
    facts = {"scale": scale, "seeds": seeds, "experts_num": sizes[0], "larger_experts_num": sizes[1]}
    for old in set(records.group_files(folder)) - {folder / f"{group}.json" for group in groups}:
        old.unlink()
    records.write(folder, groups)
    write_json(folder / "experiment.json", facts | {"tasks": list(tasks)})
    if times is not None and times.exists():
        write_atomic(folder / "times.json", times.read_bytes())


def read(folder: Path) -> Evidence:
    """The evidence in a report's folder. Raises UserError when there is none, or a file is damaged."""
    described = folder / "experiment.json"
    if not described.exists():
        raise UserError(f"{folder} holds no experiment.json; it is not a report that reproduce_tables.py wrote")
    facts = read_json(described)
    groups = records.read(folder)
    for seed in facts["seeds"]:
        if f"seed{seed}" not in groups:
            raise UserError(f"{folder} lacks seed{seed}.json, of which experiment.json speaks")
    of_seeds = {seed: groups[f"seed{seed}"] for seed in facts["seeds"]}
    _refuse_mixed(folder, of_seeds)
    return Evidence(facts["scale"], facts["experts_num"], facts["larger_experts_num"], tuple(facts["tasks"]), of_seeds)


def _refuse_mixed(folder: Path, of_seeds: dict[int, dict[str, Any]]) -> None:
    """Raises UserError where records were made under different protocols, or runs of one name from different bases, with
    different constants or of different data: one table would show both."""
    protocols: dict[Any, str] = {}
    first_of: dict[str, tuple[int, dict[str, Any]]] = {}
    bases: dict[str, dict[Any, str]] = {}
    for seed, of_seed in of_seeds.items():
        for name, record in of_seed.items():
            where = f"{name} of seed {seed}"
            protocols.setdefault(record.get("versions", {}).get("protocol"), where)
            made = results.made_with(record)
            if (base := made.get("ancestor")) is not None:
                bases.setdefault(name, {}).setdefault(base, where)
            other, alike = first_of.setdefault(name, (seed, made))
            if difference := results.changes(results.without(alike, _OF_SEED), results.without(made, _OF_SEED)):
                raise UserError(
                    f"{folder}: {where} was made with other constants or data than that of seed {other} ({difference}); one "
                    "table would show both: make one of them again"
                )
    mixed = [("under different versions of docs/protocol.md", protocols)] if len(protocols) > 1 else []
    mixed += [("from different bases", of_run) for of_run in bases.values() if len(of_run) > 1]
    for how, found in mixed:
        first, second = list(found.values())[:2]
        raise UserError(
            f"{folder}: {first} and {second} were made {how}; one table would show both: make one of them again"
        )


def start_name(e: Evidence, name: str) -> str:
    """The run whose record says what run `name` started from."""
    experts = e.m if name.endswith(str(e.m)) else e.n
    return f"reference-{experts}" if name.startswith("Baseline") else name


def starts(e: Evidence, name: str) -> list[Any]:
    """What each seed's run started from: scores of the merged model, or for a Baseline of the pre-trained one."""
    found = [one for (one,) in e.get(start_name(e, name))]
    if name.startswith("Baseline"):
        return [one["rows"]["base model, not fine-tuned"] for one in found]
    return [one["before"] for one in found]


def start_and_epochs(e: Evidence, name: str, value: Callable[[Any], float]) -> list[list[float]]:
    """For each seed `value` of the validation scores {task: scores} before training and after each epoch."""
    curves = []
    start = start_name(e, name)
    for of_seed in e.records.values():
        if name.startswith("Baseline") and start not in of_seed and (found := e.get(start)):
            of_seed = {**of_seed, start: found[0][0]}  # the base is the same for every seed, and measured once
        if {name, start} <= of_seed.keys():
            seed = Evidence(e.scale, e.n, e.m, e.tasks, {0: of_seed})
            epochs = range(len(of_seed[name]["selection"]))
            after = [{t: of_seed[name][f"{t}_data"]["validation"][epoch] for t in e.tasks} for epoch in epochs]
            curves.append([value(scores) for scores in (starts(seed, name)[0]["validation"], *after)])
    return curves


def entropy(record: Any, stack: str, task: str) -> float:
    """Normalised entropy of a task's expert use, mean over the sparse layers of a stack."""
    return fmean(record["entropy"][stack][task])


def mean_loss(scores: Any, e: Evidence) -> float:
    """Cross-entropy in nats a target token, mean over tasks."""
    return fmean(scores[task]["loss"] for task in e.tasks)


def kept_share(soup: Any, a: Any, b: Any) -> float | None:
    """Overall of a soup as a share of its parents' mean; None where they have nothing to keep."""
    parents = fmean([a["overall"]["test"], b["overall"]["test"]])
    return soup["soup"]["overall"] / parents if parents > 0 else None
