"""Records of fine-tuning runs: read, listed, and found by what was trained."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from expert_merging.core.files import read_json
from expert_merging.report.records import Groups, every

Records = list[dict[str, Any]]


def records_in(folder: Path, pattern: str, seed: int) -> Groups:
    """The records that fit `pattern`; `seed` says which part of a path names the group."""
    groups: Groups = {}
    for file in sorted(folder.glob(pattern)):
        if not file.name.endswith(".run.json"):
            groups.setdefault(file.parts[seed], {})[file.stem] = read_json(file)
    return groups


def run_file(variant: str, rates: Sequence[float], rate: float) -> str:
    """What the files of a run are called that is trained at `rate`, one of the `rates` of a command."""
    return variant if len(rates) == 1 else f"{variant}_lr{rate:g}"


def is_of_several(run: str) -> bool:
    """Whether the file of that name is of a command with several rates."""
    return "_lr" in run


def records_of(folder: Path, rates: Sequence[float] = ()) -> Groups:
    """What neighbours/MEO_finetune.py has left in the `folder` of a family and task; of several learning rates, for each run
    the one with the best validation score.

    Args:
        rates: those of a command, of which alone runs count then, of several only where there is one at each; none takes what
            there is, runs of several rates before those of one.
    """
    found = records_in(folder, "seed*/*.json", -2)
    several = len(rates) > 1 if rates else any(map(is_of_several, chain(*found.values())))
    groups: Groups = {}
    for group, runs in found.items():
        tried: dict[str, list[dict[str, Any]]] = {}
        for name, record in runs.items():
            variant, _, rate = name.partition("_lr")
            if is_of_several(name) == several and (not several or not rates or rate in [f"{one:g}" for one in rates]):
                tried.setdefault(variant, []).append(record)
        groups[group] = {name: max(own, key=_validated) for name, own in tried.items() if len(own) >= len(rates)}
    return groups


def _validated(record: dict[str, Any]) -> float:
    score = record["scores"]["validation"][record["main_score"]]
    return -score if record["main_score"] == "perplexity" else score


def listed(groups: Groups) -> Records:
    """The records, seed by seed, each with the name of its run."""
    return [{**record, "run": run} for _, run, record in every(groups)]


def having(records: Records, **wanted) -> Records:
    """Those whose variant has these properties, by seed."""
    kept = [r for r in records if all(r["variant"][name] == value for name, value in wanted.items())]
    return sorted(kept, key=lambda r: r["seed"])


def variants(records: Records) -> list[dict[str, Any]]:
    order = {"dense": 0, "block": 1}
    found = {r["variant"]["name"]: r["variant"] for r in records}
    return sorted(found.values(), key=lambda v: (order.get(v["how"], 2), v["level"], v["k"], v["how"] != "moe"))


def seeds_text(records: Records) -> str:
    return f"seeds {', '.join(str(seed) for seed in sorted({r['seed'] for r in records}))}"


def name_of(records: Records) -> str:
    return f"{records[0]['family']}_{records[0]['task']}"


def pairs_of(records: Records, variant: dict[str, Any]) -> list[tuple[dict, dict]]:
    """(MoE, MEO) of the same seed, level and k."""
    sides = [having(records, how=how, level=variant["level"], k=variant["k"]) for how in ("moe", "meo")]
    meo = {r["seed"]: r for r in sides[1]}
    return [(r, meo[r["seed"]]) for r in sides[0] if r["seed"] in meo]


def largest(values) -> str:
    return f"{max(float(v) for v in values):.1e}"
