"""The primary contrasts of docs/protocol.md: what each run's difference to CAEM says, over seeds and test examples."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from expert_merging.analysis import crossed_bootstrap as bootstrap
from expert_merging.core.errors import UserError
from expert_merging.data.scores import unpack
from expert_merging.experiment.grid import RIVALS
from expert_merging.report.evidence import Evidence
from expert_merging.report.tables import Table

MARGIN = 0.02  # of the single-task models' score, within which two runs count as equal

_NOTE = (
    f"Differences within seeds: mean [95% interval, bootstrap crossed over seeds and test examples, {bootstrap.METHOD}; of one "
    "seed over examples alone]. p: sign flips over seeds, by Holm over the contrasts of the same measure. Equivalent: two "
    "one-sided tests at 5%, margin 2% of the single-task score. Told: the smallest true difference that this experiment tells "
    "in 80% of repeats, at the spread found. Pooled: single-task scores averaged over seeds before dividing, their "
    "chance over seeds left out. See docs/protocol.md."
)


def contrasts(e: Evidence) -> Table:
    """A row for each primary contrast and measure, as far as the runs are there with each example's score."""
    table = Table("contrasts", "Primary contrasts", _NOTE)
    pairs = [(f"CAEM-{e.n}", name) for name in _against(e) if seeds_of(e, f"CAEM-{e.n}", name)]
    for measure, of_pairs in compared(e, pairs, ("Overall", "Overall, pooled", *e.tasks)).items():
        ps = bootstrap.holm([bootstrap.sign_flip_p(found.by_seed) for found, _ in of_pairs])
        for (first, second), (found, arms), p in zip(pairs, of_pairs, ps, strict=True):
            unit = 1.0 if measure.startswith("Overall") else float(arms[2].found[measure].mean())
            table.rows.append(_row(e, measure, (first, second), found, arms, p, len(of_pairs), unit))
    return table


def compared(
    e: Evidence, pairs: Sequence[tuple[str, str]], measures: Sequence[str]
) -> dict[str, list[tuple[bootstrap.Contrast, list[bootstrap.Means]]]]:
    """{measure: for each pair of runs the contrast, and the mean scores of both and of the single-task models}, all over
    the same draws of test examples."""
    arms_of = arms_of_seeds(e, pairs)
    return {measure: [(_contrast(measure, arms), arms) for arms in arms_of] for measure in measures}


def arms_of_seeds(e: Evidence, groups: Sequence[tuple[str, ...]]) -> list[list[bootstrap.Means]]:
    """For each group of runs the mean scores of each and of the single-task models, for the seeds that have all of them; over
    the same draws of test examples in all groups."""
    if not groups:
        return []
    names = list(dict.fromkeys(name for group in groups for name in group))
    models = {name: {task: _scores(e, name, seeds_of(e, name), task) for task in e.tasks} for name in names}
    singles = seeds_of(e)
    models["single"] = {task: _scores(e, f"single-task-{e.n} {task}", singles, task) for task in e.tasks}
    means = bootstrap.resample(models)
    arms_of = []
    for group in groups:
        seeds = seeds_of(e, *group)
        arms = [means[name].of([seeds_of(e, name).index(seed) for seed in seeds]) for name in group]
        arms_of.append([*arms, means["single"].of([singles.index(seed) for seed in seeds])])
    return arms_of


def _against(e: Evidence) -> list[str]:
    """What CAEM is compared with, in the protocol's order; of the pooled rivals the one that validates best."""
    rivals = [name for name in (f"{method}-{e.n}" for method in RIVALS) if e.get(name)]
    shared = e.get(*rivals) if rivals else []  # seeds that have run them all
    validated = [[one["overall"]["validation"] for one in of_seed] for of_seed in shared]
    best = rivals[int(np.mean(validated, axis=0).argmax())] if shared else None
    fixed = [f"Baseline-{e.n}", f"Baseline-{e.n}-same-compute", f"CAEM-{e.n}-Avg", f"Average-{e.n}"]
    return [name for name in (*fixed, best) if name]


def by_interval(found: bootstrap.Contrast, digits: int) -> tuple[str, str]:
    """(the difference with its interval, what that alone says), for contrasts that no test of a family is made of."""
    difference, seeds = f"{found.mean:+.{digits}f}", len(found.by_seed)
    if seeds < 2:
        return difference, bootstrap.ONE_SEED
    low, high = bootstrap.interval(found)
    return f"{difference} [{low:+.{digits}f}, {high:+.{digits}f}]", bootstrap.side(low, high, seeds)


def seeds_of(e: Evidence, *names: str) -> list[int]:
    """The seeds that have all of these runs and the single-task ones, each with every example's score."""
    needed = (*names, *(f"single-task-{e.n} {task}" for task in e.tasks))
    return [
        seed
        for seed, of_seed in e.records.items()
        if all(name in of_seed and _has_each(of_seed[name]) for name in needed)
    ]


def _has_each(record: Any) -> bool:
    return all("test_each" in record[f"{task}_data"] for task in record["tasks"])


def _scores(e: Evidence, name: str, seeds: list[int], task: str) -> np.ndarray:
    """[seeds, examples]"""
    found = [unpack(e.records[seed][name][f"{task}_data"]["test_each"]) for seed in seeds]
    if len({len(one) for one in found}) > 1:
        raise UserError(f"{name}: the seeds {seeds} were not tested on the same examples of {task}")
    return np.stack(found)


def _contrast(measure: str, arms: list[bootstrap.Means]) -> bootstrap.Contrast:
    statistic = _statistic(measure)
    if len(arms[0].found[next(iter(arms[0].found))]) > 1:
        return bootstrap.contrast(statistic, arms)
    value = statistic(*[{task: mean[None] for task, mean in arm.found.items()} for arm in arms])
    return bootstrap.Contrast(value[0], np.array([]), np.array([]))  # one seed, of which no spread can be seen


def _statistic(measure: str) -> bootstrap.Statistic:
    known = {"Overall": bootstrap.overall_difference, "Overall, pooled": bootstrap.overall_difference_pooled}
    return known[measure] if measure in known else bootstrap.task_difference(measure)


def _row(
    e: Evidence, measure: str, pair: tuple[str, str], found: bootstrap.Contrast, arms: list[bootstrap.Means], p: float,
    family: int, unit: float,
) -> dict[str, Any]:  # fmt: skip
    digits = 4 if measure.startswith("Overall") else 2
    row = {"contrast": " - ".join(pair), "measure": measure, "seeds": len(found.by_seed)}
    several = len(found.by_seed) > 1
    low, high = bootstrap.interval(found) if several else bootstrap.estimate(_statistic(measure), arms)[1:]
    difference = f"{found.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    if not several:
        said = {"difference": difference, "p": "", "told": "", "verdict": bootstrap.ONE_SEED}
    else:
        told = bootstrap.detectable(found, family)
        said = {
            "difference": difference, "p": f"{p:.3f}",
            "told": f"{told:.{digits}f} ({told / unit:.1%})" if np.isfinite(told) else "nothing with so few seeds",
            "verdict": _verdict(found, p, MARGIN * unit, family),
        }  # fmt: skip
    singles = [f"single-task-{e.n} {task}" for task in e.tasks]
    return {**row, **said, "from": e.source(*pair, *singles)}


def _verdict(found: bootstrap.Contrast, p: float, margin: float, family: int) -> str:
    said = bootstrap.verdict(found, p, margin)
    if said != bootstrap.UNKNOWN:
        return said
    needed = bootstrap.seeds_needed(found, family) if found.mean else None
    return bootstrap.undecided(needed, len(found.by_seed))
