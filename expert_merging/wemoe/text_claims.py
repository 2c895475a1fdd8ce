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
LITTLE = 0.1  # that a coefficient of AdaMerging's moved: less, and it is task arithmetic still

_NOTE = (
    "Differences of mean test accuracy (points) within seeds: mean [95% interval, bootstrap crossed over seeds and examples, "
    f"{bootstrap.METHOD}]. p: the larger of those by the t distribution behind the interval and by the paired t test over "
    "seeds, by Holm over the claims that one method is above another; sign flips: over seeds alone, uncorrected; of one seed "
    f"the interval is over examples alone. Within {MARGIN:g}: two one-sided tests at 5%, by the same p; equivalent: the "
    "same two tests, by Holm over these claims."
)


def claims(groups: Groups, labels: Mapping[str, str]) -> Table:
    """A row a claim, as far as its two methods are there with every example's score."""
    table = Table("claims", "Claims", _NOTE + _hardly_adapted(groups))
    pairs = (*zip(CHAIN, CHAIN[1:], strict=False), EQUAL)
    runs = {pair: [f"main.{method}" for method in pair] for pair in pairs}
    seeds = {pair: _seeds(groups, *two) for pair, two in runs.items()}
    arms = {pair: _arms(groups, those, *runs[pair]) for pair, those in seeds.items() if those}
    told = {pair: bootstrap.contrast(_difference, two) for pair, two in arms.items() if len(seeds[pair]) > 1}
    above = {pair: one for pair, one in told.items() if pair != EQUAL}
    p = bootstrap.adjusted({pair: bootstrap.difference_p(one) for pair, one in above.items()})
    alike = bootstrap.adjusted({pair: bootstrap.equivalence_p(one, MARGIN) for pair, one in above.items()})
    for pair, two in arms.items():
        first, second = (labels.get(name, name) for name in pair)
        said = f"{first} within {MARGIN:g} of {second}" if pair == EQUAL else f"{first} > {second}"
        row: dict[str, Any] = {"claim": said, "seeds": len(seeds[pair]), "difference": _estimated(two)}
        row["p"] = f"{p[pair]:.3f}" if pair in p else ""
        row["sign flips"] = f"{bootstrap.sign_flip_p(told[pair].by_seed):.3f}" if pair in p else ""
        row["verdict"] = _verdict(told[pair], p.get(pair), alike.get(pair)) if pair in told else bootstrap.ONE_SEED
        table.rows.append(row | {"from": source(groups, *runs[pair])})
    return table


def difference(groups: Groups, first: str, second: str) -> str:
    """Mean test accuracy (points) of run `first` less that of `second` with its 95% interval, over the seeds that have both;
    "" where none has."""
    seeds = _seeds(groups, first, second)
    return _estimated(_arms(groups, seeds, first, second)) if seeds else ""


def _estimated(arms: list[bootstrap.Means]) -> str:
    mean, low, high = bootstrap.estimate(_difference, arms)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def _hardly_adapted(groups: Groups) -> str:
    """What the note says where no coefficient of AdaMerging's could move far: a test of so few steps is none of its claim."""
    records = [runs["main.adamerging_layer"] for runs in groups.values() if "main.adamerging_layer" in runs]
    told = [(r["adaptation"], r["coefficient"]) for r in records if "coefficients" in (r.get("adaptation") or {})]
    moved = [abs(x - start) for one, start in told for of_tensor in one["coefficients"].values() for x in of_tensor]
    if not moved or max(moved) >= LITTLE:
        return ""
    return (
        f" AdaMerging's coefficients took {told[0][0]['steps_done']} steps of Adam at {told[0][0]['lr']:g} and moved by "
        f"{max(moved):.3f} at most from task arithmetic's: its place says nothing of the paper's order."
    )


def _verdict(one: bootstrap.Contrast, p: float | None, alike: float | None) -> str:
    """`p`, and `alike`, that of being equivalent, are None for the claim of two being equal."""
    if p is None or alike is None:
        return equal(one)
    if (said := bootstrap.verdict(one, p, MARGIN, alike=alike)) != bootstrap.UNKNOWN:
        return said
    return bootstrap.undecided(bootstrap.seeds_needed(one, len(CHAIN) - 1, flips=False), len(one.by_seed))


def equal(one: bootstrap.Contrast) -> str:
    """Whether two means are within MARGIN: two one-sided tests at 5%; that they are not: the interval of level 90%."""
    if bootstrap.equivalence_p(one, MARGIN) < 0.05:
        return bootstrap.HELD
    low, high = bootstrap.interval(one, 0.9)
    return bootstrap.NOT if low > MARGIN or high < -MARGIN else bootstrap.UNKNOWN


def _seeds(groups: Groups, *runs: str) -> list[str]:
    return [group for group, of_seed in groups.items() if all(run in of_seed for run in runs)]


def _arms(groups: Groups, seeds: list[str], *runs: str) -> list[bootstrap.Means]:
    tasks = groups[seeds[0]][runs[0]]["tasks"]
    means = bootstrap.resample({run: {task: _each(groups, seeds, run, task) for task in tasks} for run in runs})
    return [means[run] for run in runs]


def _difference(one: bootstrap.Scores, other: bootstrap.Scores) -> np.ndarray:
    return np.mean([one[task] - other[task] for task in one], axis=0)


def _each(groups: Groups, seeds: list[str], run: str, task: str) -> np.ndarray:
    """[seeds, examples], 0 or 100"""
    found = [unpack(groups[seed][run][task]["each"]) for seed in seeds]
    if len({len(each) for each in found}) > 1:
        raise UserError(f"{run}: the seeds were not tested on the same examples of {task}")
    return np.stack(found)
