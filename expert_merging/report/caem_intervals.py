"""Each run's scores with what seeds and test examples leave open of them."""

import numpy as np

from expert_merging.analysis import crossed_bootstrap as bootstrap
from expert_merging.report.caem_contrasts import arms_of_seeds, seeds_of
from expert_merging.report.evidence import Evidence
from expert_merging.report.tables import Table

_NOTE = (
    f"Mean [95% interval, bootstrap crossed over seeds and test examples, {bootstrap.METHOD}; of one seed over examples "
    "alone]. Overall: mean over tasks of score / score of the single-task model with {experts} experts. Two intervals that "
    "overlap may still differ: differences are in the table of contrasts."
)


def intervals(e: Evidence) -> Table:
    """A row for the single-task models and for each jointly fine-tuned run that has every example's score."""
    table = Table("intervals", "Test scores with their intervals", _NOTE.format(experts=e.n))
    if not seeds_of(e):
        return table
    singles = [f"single-task-{e.n} {task}" for task in e.tasks]
    groups = [(), *((name,) for name in e.multi_task() if seeds_of(e, name))]  # of no run: the single-task models
    for group, arms in zip(groups, arms_of_seeds(e, groups), strict=True):
        table.rows.append({
            "configuration": group[0] if group else f"single-task models, {e.n} experts", "seeds": len(seeds_of(e, *group)),
            "Overall": _text(bootstrap.estimate(_overall, arms), 4) if group else "1",
            **{f"{task} {e.main_score(task)}": _text(bootstrap.estimate(_of(task), arms), 2) for task in e.tasks},
            "from": e.source(*group, *singles),
        })  # fmt: skip
    return table


def _overall(run: bootstrap.Scores, single: bootstrap.Scores) -> np.ndarray:
    """Over the tasks whose single-task score is above 0, as `training.overall` has it; 0 where none is."""
    scored = {task: single[task] > 0 for task in run}
    ratios = [np.divide(run[task], single[task], out=np.zeros_like(run[task]), where=scored[task]) for task in run]
    return np.sum(ratios, axis=0) / np.maximum(np.sum(list(scored.values()), axis=0), 1)


def _of(task: str) -> bootstrap.Statistic:
    return lambda scores, *_: scores[task]


def _text(estimate: tuple[float, float, float], digits: int) -> str:
    mean, low, high = (f"{value:.{digits}f}" for value in estimate)
    return f"{mean} [{low}, {high}]"
