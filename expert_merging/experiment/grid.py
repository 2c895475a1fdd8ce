"""The experiment as data: which runs there are, what each needs, and what the tables call them."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.experiment.steps import Step
from expert_merging.merging.registry import METHODS, SHARES
from expert_merging.run.results import pair_name, run_label, run_name

# Cases of methods that pool experts: published ones, the best of which is a primary contrast, and floors.
RIVALS = {"MSMoE": "m_smoe", "HCSMoE": "hc_smoe", "REAP": "reap"}
CALIBRATED = {"CAEM": "caem", "Average": "average"}  # cases that are there with calibrated routers too
POOLED_CASES = RIVALS | {"MostUsed": "most_used", "AtRandom": "at_random"}

# Of which runs a part consists; what those need comes by itself. {n} and {m}: few and many experts (8 and 16).
PARTS = {
    "comparison": ("Baseline-{n}", "CAEM-{n}", "reference-{n}"),
    "table2": (
        "reference-{n}", "reference-{m}", "Baseline-{n}", "Baseline-{m}", "CAEM-{n}", "CAEM-{n}-to-{m}", "CAEM-{m}",
        "CAEM-{n}-Avg", "CAEM-{m}-Avg",
    ),
    "controls": ("Average-{n}", "Baseline-{n}-same-compute"),
    "pairs": (
        "CAEM-{n} + Baseline-{n}", "CAEM-{n} + CAEM-{n}-Avg", "CAEM-{n}-Avg + Baseline-{n}",
        "CAEM-{m} + Baseline-{m}", "CAEM-{m} + CAEM-{m}-Avg", "CAEM-{m}-Avg + Baseline-{m}",
        "CAEM-{n}-to-{m} + Baseline-{m}", "CAEM-{n}-to-{m} + CAEM-{m}", "CAEM-{n}-to-{m} + CAEM-{m}-Avg",
        "CAEM-{n}-to-{m} + CAEM-{n}",
    ),
    "audit": ("usage", "CAEM-{n}-counts", "CAEM-{n}-projection"),
    "merging": ("Baseline-{n}", "CAEM-{n}", "merging-{n}"),
    "primary": (
        "Baseline-{n}", "Baseline-{n}-same-compute", "CAEM-{n}", "CAEM-{n}-Avg", "Average-{n}",
        *(f"{case}-{{n}}" for case in RIVALS),
    ),
    "floors": ("MostUsed-{n}", "AtRandom-{n}"),
    "calibration": ("CAEM-{n}", "Average-{n}", "CAEM-{n}-calibrated", "Average-{n}-calibrated"),
    "response": ("CAEM-{n}", "CAEM-{n}-Avg", "CAEM-{n}-inverse", "CAEM-{n}-tokens", "CAEM-{n}-random", "CAEM-{n}-to-one"),
}  # fmt: skip
# Pairs whose hidden states are compared (figures 2 and 4); of other sizes or not.
_CKA = (
    "CAEM-{n} + Baseline-{n}",
    "CAEM-{m} + Baseline-{m}",
    "CAEM-{n}-to-{m} + CAEM-{n}",
    "CAEM-{n}-to-{m} + CAEM-{m}",
    "CAEM-{n}-to-{m} + Baseline-{m}",
)


@dataclass(frozen=True)
class Grid:
    """All runs for one seed, by name, in an order in which each comes after what it needs."""

    steps: dict[str, Step]
    needs: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def chosen(self, names: list[str]) -> dict[str, Step]:
        """Those of `names` with all that they need."""
        wanted, more = set(), list(names)
        while more:
            name = more.pop()
            if name not in wanted:
                wanted.add(name)
                more += self.needs[name]
        return {name: step for name, step in self.steps.items() if name in wanted}

    def results_for(self, name: str) -> tuple[Path, ...]:
        """The results that the run of that name reads."""
        return tuple(self.steps[needed].result for needed in self.needs[name])


def grid(c: SimpleNamespace) -> Grid:
    """The runs with the constants `c` (those of global_config.py for one seed, experts_num and larger_experts_num)."""
    n, m, tasks = c.experts_num, c.larger_experts_num, c.task_types
    if n == m:
        raise UserError(
            f"experts_num and larger_experts_num are both {n}; give another larger_experts_num, used or not"
        )
    pickles, one = Path(c.PICKLE_PATH), "Baseline_multi_task_finetune.py"
    steps: dict[str, Step] = {}
    needs: dict[str, tuple[str, ...]] = {}

    def add(name: str, script: str, constants: dict[str, Any], result: Path, *needed: str, **more: Path) -> None:
        steps[name], needs[name] = Step(script, constants, result, **more), needed

    for task in tasks:
        add(
            f"features {task}",
            "datasets_preprocessing.py",
            {"num_expert": n},
            Path(c.DATA_DIR) / task / "complete.json",
            also=Path(c.DATA_DIR) / "lengths.png",
        )
    data = tuple(f"features {task}" for task in tasks)
    singles = {}
    for experts in (n, m):
        folder = Path(c.SOURCE_PICKLE_PATH.format(experts=experts))
        singles[experts] = tuple(f"single-task-{experts} {task}" for task in tasks)
        for task in tasks:
            own = {"task_type": task, "num_expert": experts}
            result = folder / f"single_task_{task}.json"
            work = Path(c.SOURCE_MODEL_WEIGHT_PATH.format(experts=experts)) / f"single_task_{task}.run"
            add(f"single-task-{experts} {task}", "single_task_finetune.py", own, result, *data, work=work)
        result = folder / "reference_scores.json"
        own, work = {"num_expert": experts}, folder / "reference_scores.run.json"
        add(f"reference-{experts}", "tools/reference_scores.py", own, result, *singles[experts], work=work)

    def multi_task(script: str, case: str, sizes: tuple[int, ...], *needed: str, **own: Any) -> None:
        names = ("experts_num",) if len(sizes) == 1 else ("source_experts_num", "target_experts_num")
        constants = dict(zip(names, sizes, strict=True)) | own | {"current_case_name": case}
        run = run_name(case, *sizes)
        work = Path(c.MODEL_SAVE_PATH) / f"{run}.run"
        add(run_label(run), script, constants, pickles / f"{run}.json", *needed, work=work)

    for experts in (n, m):
        multi_task(one, "Baseline", (experts,), *singles[experts])
    merges: list[tuple[str, int, int, dict[str, Any]]] = [
        ("CAEM", n, n, {}),
        ("CAEM", n, m, {}),
        ("CAEM", m, m, {}),
        ("CAEM-Avg", n, n, {"alpha": 0.0}),
        ("CAEM-Avg", m, m, {"alpha": 0.0}),
        ("Average", n, n, {"merging": "average"}),
        ("CAEM-projection", n, n, {"reading": "paper+projection"}),
        ("CAEM-counts", n, n, {"reading": "paper+counts"}),
        *((case, n, n, {"merging": method}) for case, method in POOLED_CASES.items()),
        *(
            (f"{case}-calibrated", n, n, {"merging": method, "calibration": "routers"})
            for case, method in CALIBRATED.items()
        ),
        *((f"CAEM-{shares}", n, n, {"shares": shares}) for shares in (*SHARES, *tasks) if shares != "entropy"),
    ]
    for case, source, target, constants in merges:
        needed = (*singles[source], *singles[target], *(["usage"] if "reading" in constants else []))
        constants = {"alpha": 1.0, "merging": "caem"} | constants
        multi_task("CAEM_multi_task_finetune.py", case, (source, target), *needed, **constants)
    multi_task(one, "Baseline-same-compute", (n,), *singles[n], same_compute=True)

    # All by one command.
    own = {"experts_num": n, "methods": tuple(METHODS), "current_case_name": "Merging"}
    for method in METHODS:
        result = pickles / f"{run_name(f'Merging-{method}', n)}.json"
        add(f"merging-{n} {method}", "neighbours/WEMoE_multi_task_merging.py", own, result, *singles[n])

    folder = Path(c.SOURCE_PICKLE_PATH.format(experts=n))
    for task in tasks:
        own = {"task_type": task, "num_expert": n}
        add(
            f"usage {task}",
            "tools/count_expert_usage.py",
            own,
            folder / f"expert_usage_{task}.json",
            f"single-task-{n} {task}",
        )
    needs = {name: tuple(x for one in needed for x in _expanded(one, tasks)) for name, needed in needs.items()}

    for pattern in PARTS["pairs"]:
        name = pattern.format(n=n, m=m)
        first, second = name.split(" + ")
        runs = [steps[one].result.stem for one in (first, second)]
        measures = [measure for measure in ("soup", "line", "cka") if _measured(measure, pattern)]
        result = pickles / "pairs" / f"{pair_name(*runs)}.json"
        own = {"first": runs[0], "second": runs[1], "measures": tuple(measures)}
        add(name, "tools/compare_models.py", own, result, first, second, work=result.with_suffix(".run.json"))
    # Usage is counted before the runs that merge by it.
    order = sorted(
        steps, key=lambda name: (name.startswith("CAEM") and "reading" in steps[name].constants, " + " in name)
    )
    return Grid({name: steps[name] for name in order}, needs)


def names_of(part: str, c: SimpleNamespace, grid: Grid) -> list[str]:
    """The runs that `part` names: a part of the evidence, or a single run. Raises UserError for neither."""
    n, m = c.experts_num, c.larger_experts_num
    patterns = PARTS.get(part, (part,))
    names = [name for pattern in patterns for name in _expanded(pattern.format(n=n, m=m), c.task_types)]
    if unknown := [name for name in names if name not in grid.steps]:
        runs = ", ".join(f"'{name}'" if " " in name else name for name in grid.steps)
        raise UserError(f"parts names {unknown[0]!r}; there are the parts {', '.join(PARTS)} and the runs {runs}")
    return names


def _expanded(name: str, tasks: tuple[str, ...]) -> list[str]:
    if name.startswith("merging-") and " " not in name:
        return [f"{name} {method}" for method in METHODS]
    if name.endswith("-to-one"):
        return [f"{name.removesuffix('to-one')}{task}" for task in tasks]
    return [f"usage {task}" for task in tasks] if name == "usage" else [name]


def _measured(measure: str, pattern: str) -> bool:
    """Hidden states can be compared between any two models, weights only where they are of one shape."""
    return pattern in _CKA if measure == "cka" else pattern != "CAEM-{n}-to-{m} + CAEM-{n}"
