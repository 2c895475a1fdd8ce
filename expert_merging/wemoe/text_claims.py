"""Which of WEMoE's claims hold on texts: differences within seeds, with intervals over seeds and test examples."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from expert_merging.analysis import crossed_bootstrap as bootstrap
from expert_merging.core.errors import UserError
from expert_merging.data.scores import unpack
from expert_merging.report.records import Groups, source
from expert_merging.report.tables import Table

CHAIN = ("wemoe", "adamerging_layer", "ties", "task_arithmetic", "average")  # each claimed to be above the next
EQUAL = ("ewemoe_90", "wemoe")  # claimed to be within MARGIN
MARGIN = 1.0  # points of accuracy

_NOTE = (
    "Differences of mean test accuracy (points) within seeds: mean [95% interval, bootstrap crossed over seeds and examples, "
    "10,000 draws]. p: by the t distribution behind the interval, by Holm over the claims that one method is above another; "
    f"sign flips: over seeds alone, uncorrected. Within {MARGIN:g}, and equivalent within as much: two one-sided tests at 5%."
)


def claims(groups: Groups, labels: Mapping[str, str]) -> Table:
    """A row a claim, as far as its two methods are there with every example's score."""
    table = Table("claims", "Claims", _NOTE)
    pairs = [pair for pair in (*zip(CHAIN, CHAIN[1:], strict=False), EQUAL) if _seeds(groups, *pair)]
    if not pairs:
        return table
    found = [_contrast(groups, *pair) for pair in pairs]
    above = [one for pair, one in zip(pairs, found, strict=True) if pair != EQUAL]
    ps = iter(bootstrap.holm([_p(one) for one in above]))
    for pair, one in zip(pairs, found, strict=True):
        first, second = (labels.get(name, name) for name in pair)
        row: dict[str, Any] = {
            "claim": f"{first} within {MARGIN:g} of {second}" if pair == EQUAL else f"{first} > {second}"
        }
        row |= {"seeds": len(one.by_seed)} | _said(one, None if pair == EQUAL else next(ps))
        table.rows.append(row | {"from": source(groups, *(f"main.{name}" for name in pair))})
    return table


def _said(one: bootstrap.Contrast, p: float | None) -> dict[str, str]:
    """`p` is None for the claim of two being equal."""
    if len(one.by_seed) < 2:
        return {"difference": f"{one.mean:+.2f}", "p": "", "sign flips": "", "verdict": "cannot tell: one seed"}
    low, high = bootstrap.interval(one)
    shown = {"difference": f"{one.mean:+.2f} [{low:+.2f}, {high:+.2f}]", "p": "" if p is None else f"{p:.3f}"}
    shown["sign flips"] = "" if p is None else f"{bootstrap.sign_flip_p(one.by_seed):.3f}"
    if p is not None:
        said = bootstrap.verdict(one, p, MARGIN)
        seeds = bootstrap.seeds_needed(one, len(CHAIN) - 1, flips=False)
        return shown | {"verdict": bootstrap.undecided(seeds) if said == bootstrap.UNKNOWN else said}
    return shown | {"verdict": equal(one)}


def _p(one: bootstrap.Contrast) -> float:
    return bootstrap.interval_p(one) if len(one.by_seed) > 1 else 1.0


def equal(one: bootstrap.Contrast) -> str:
    """Whether two means are within MARGIN: two one-sided tests at 5%, that is the interval of level 90%."""
    low, high = bootstrap.interval(one, 0.9)
    if -MARGIN < low and high < MARGIN:
        return bootstrap.HELD
    return bootstrap.NOT if low > MARGIN or high < -MARGIN else bootstrap.UNKNOWN


def _seeds(groups: Groups, *methods: str) -> list[str]:
    return [group for group, runs in groups.items() if all(f"main.{method}" in runs for method in methods)]


def _contrast(groups: Groups, first: str, second: str) -> bootstrap.Contrast:
    seeds = _seeds(groups, first, second)
    tasks = groups[seeds[0]][f"main.{first}"]["tasks"]
    arms = {name: {task: _each(groups, seeds, name, task) for task in tasks} for name in (first, second)}
    means = bootstrap.resample(arms)

    def difference(one: bootstrap.Scores, other: bootstrap.Scores) -> np.ndarray:
        return np.mean([one[task] - other[task] for task in one], axis=0)

    if len(seeds) > 1:
        return bootstrap.contrast(difference, [means[first], means[second]])
    value = np.array([np.mean([means[first].found[t] - means[second].found[t] for t in tasks])])
    return bootstrap.Contrast(value, np.array([]), np.array([]))  # one seed, of which no spread can be seen


def _each(groups: Groups, seeds: list[str], method: str, task: str) -> np.ndarray:
    """[seeds, examples], 0 or 100"""
    found = [unpack(groups[seed][f"main.{method}"][task]["each"]) for seed in seeds]
    if len({len(each) for each in found}) > 1:
        raise UserError(f"main.{method}: the seeds were not tested on the same examples of {task}")
    return np.stack(found)
