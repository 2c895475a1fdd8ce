"""MEO's claims against runs on several tasks: differences of mean accuracy, over seeds and test examples, with verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expert_merging.analysis import crossed_bootstrap as bootstrap
from expert_merging.core.errors import UserError
from expert_merging.data.scores import unpack
from expert_merging.meo.run_records import Records, having, variants

MARGIN = 1.0  # points of accuracy, within which two models count as equal
HELP, ASIDE = "more experts help", "the experts help, beside the token block"
EQUAL, TOKEN = "MEO equals vanilla MoE", "token level above sequence level"
RULE = (
    "Difference in accuracy, points, mean over tasks [95% interval, bootstrap crossed over seeds and test examples, "
    f"{bootstrap.METHOD}]. p: the larger of those by the t distribution behind the interval and by the paired t test over "
    f"seeds, after Holm over all claims; of '{EQUAL}' that of two one-sided tests, margin {MARGIN:g} point, which does not "
    "hold where the 95% interval, uncorrected, lies beyond the margin. Equivalent, of the other claims: the same two tests, "
    "after Holm over these claims."
)


@dataclass(frozen=True)
class Claim:
    """That the variant `first` is above `second`, or, where it says `EQUAL`, as good."""

    claim: str
    first: str
    second: str


class Runs:
    """The scores of single test examples, and the means that bootstrap draws: of each variant [seeds] and [draws, seeds]."""

    def __init__(self, records: Records):
        """Raises UserError where the seeds of a task were not tested on the same examples."""
        self.tasks = list(dict.fromkeys(record["task"] for record in records))
        self.names = [variant["name"] for variant in variants(records)]
        self.seeds: dict[str, list[int]] = {}
        scores: dict[str, dict[str, np.ndarray]] = {}
        for name in self.names:
            of = {task: {r["seed"]: r for r in having(records, name=name) if r["task"] == task} for task in self.tasks}
            if seeds := sorted(set.intersection(*map(set, of.values()))):
                self.seeds[name] = seeds
                scores[name] = {t: _stacked(t, [unpack(own[s]["test_each"]) for s in seeds]) for t, own in of.items()}
        for task in self.tasks if scores else ():
            _stacked(task, [row for of_tasks in scores.values() for row in of_tasks[task]])
        self.means = bootstrap.resample(scores) if scores else {}

    def shared(self, *names: str) -> list[int]:
        """The seeds that have run all of these variants on all tasks."""
        return sorted(set.intersection(*(set(self.seeds.get(name, ())) for name in names)))

    def arms(self, *names: str) -> list[bootstrap.Means]:
        """Of the shared seeds."""
        seeds = self.shared(*names)
        return [self.means[name].of([self.seeds[name].index(seed) for seed in seeds]) for name in names]

    def estimate(self, name: str, task: str = "") -> tuple[float, float, float]:
        """(mean, low, high) of a variant's accuracy on a task, or of the mean over tasks; of one seed over examples alone."""
        return bootstrap.estimate(lambda own: own[task] if task else _mean(own), self.arms(name))

    def difference(self, first: str, second: str, task: str = "") -> tuple[float, float, float]:
        """Likewise of the difference between two variants."""
        statistic = bootstrap.task_difference(task) if task else _difference
        return bootstrap.estimate(statistic, self.arms(first, second))


def _stacked(task: str, rows: Sequence[np.ndarray]) -> np.ndarray:
    if len({len(row) for row in rows}) > 1:
        raise UserError(f"the runs on {task} were not tested on the same examples; run those of one test set again")
    return np.stack(rows)


def _mean(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.mean(list(scores.values()), axis=0)


def asked(found: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """The claims that can be asked of these variants."""
    name = {(v["how"], v["level"], v["k"]): v["name"] for v in found}
    dense, block = (name.get((how, "", 1)) for how in ("dense", "block"))
    meo = [(level, k) for how, level, k in name if how == "meo"]
    pairs = [(HELP, ("meo", level, k), dense) for level, k in meo]
    pairs += [(ASIDE, ("meo", level, k), block) for level, k in meo if level == "token"]
    pairs += [(EQUAL, ("meo", level, k), name.get(("moe", level, k))) for level, k in meo]
    for how, level, k in name:
        pairs += [(TOKEN, (how, level, k), name.get((how, "sequence", k)))] if level == "token" else []
    return [Claim(claim, name[first], second) for claim, first, second in pairs if second]


def judged(runs: Runs, claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """A row a claim: difference with interval, p by Holm over all claims, verdict; of one seed no p."""
    several = [claim for claim in claims if len(runs.shared(claim.first, claim.second)) > 1]
    found = {claim: bootstrap.contrast(_difference, runs.arms(claim.first, claim.second)) for claim in several}
    adjusted = bootstrap.adjusted({claim: _p(claim, contrast) for claim, contrast in found.items()})
    others = {claim: contrast for claim, contrast in found.items() if claim.claim != EQUAL}
    alike = bootstrap.adjusted({claim: bootstrap.equivalence_p(one, MARGIN) for claim, one in others.items()})
    rows = []
    for claim in claims:
        if not (seeds := runs.shared(claim.first, claim.second)):
            continue
        mean, low, high = (round(value, 2) + 0.0 for value in runs.difference(claim.first, claim.second))
        verdict = bootstrap.ONE_SEED
        if claim in found:
            verdict = _verdict(claim, found[claim], adjusted[claim], alike.get(claim, 1.0), len(found))
        rows.append({
            "claim": claim.claim, "difference": f"{claim.first} - {claim.second}", "seeds": len(seeds),
            "points": f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]",
            "p": f"{adjusted[claim]:.3f}" if claim in adjusted else "", "verdict": verdict,
        })  # fmt: skip
    return rows


def _difference(first: bootstrap.Scores, second: bootstrap.Scores) -> np.ndarray:
    return _mean(first) - _mean(second)


def _p(claim: Claim, found: bootstrap.Contrast) -> float:
    return bootstrap.equivalence_p(found, MARGIN) if claim.claim == EQUAL else bootstrap.difference_p(found)


def _verdict(claim: Claim, found: bootstrap.Contrast, p: float, alike: float, family: int) -> str:
    """`p` is adjusted for so many claims; `alike` is that of being equivalent, of a claim that is another one."""
    if claim.claim != EQUAL:
        if (said := bootstrap.verdict(found, p, MARGIN, alike=alike)) != bootstrap.UNKNOWN:
            return said
        return bootstrap.undecided(bootstrap.seeds_needed(found, family, flips=False), len(found.by_seed))
    if p < 0.05:
        return bootstrap.EQUIVALENT
    low, high = bootstrap.interval(found)
    if low > MARGIN or high < -MARGIN:
        return bootstrap.NOT
    needed = bootstrap.seeds_needed(found, family, distance=abs(MARGIN - abs(found.mean)), flips=False)
    return bootstrap.undecided(needed, len(found.by_seed))
