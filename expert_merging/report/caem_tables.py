"""The records of an experiment, and the tables made of them. Imports no model: whoever has the files can make them again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json
from expert_merging.report import claims
from expert_merging.report.tables import Stat, Table, stat

# The paper's numbers (tables 2-5), shown beside ours at scale `paper`.
PAPER_SCORES = {
    "Baseline-8": (0.9862, 94.72, 76.50, 29.36), "Baseline-16": (0.9881, 94.33, 76.64, 29.88),
    "CAEM-8": (1.0056, 94.57, 76.51, 31.26), "CAEM-8-to-16": (1.0012, 94.37, 76.90, 31.02),
    "CAEM-16": (1.0007, 94.03, 77.15, 30.98), "CAEM-8-Avg": (0.9986, 94.20, 76.59, 30.68),
    "CAEM-16-Avg": (0.9990, 94.39, 76.58, 30.94),
}  # fmt: skip
PAPER_ENTROPIES = {"CAEM-8": (0.4524, 0.5923), "CAEM-8-to-16": (0.3345, 0.5312), "CAEM-16": (0.3966, 0.4677)}
PAPER_SOUPS = {
    "CAEM-8 + Baseline-8": 0.8531, "CAEM-8 + CAEM-8-Avg": 0.8880, "CAEM-8-Avg + Baseline-8": 0.8592,
    "CAEM-16 + Baseline-16": 0.9035, "CAEM-16 + CAEM-16-Avg": 0.9337, "CAEM-16-Avg + Baseline-16": 0.8678,
    "CAEM-8-to-16 + Baseline-16": 0.0, "CAEM-8-to-16 + CAEM-16": 0.0011, "CAEM-8-to-16 + CAEM-16-Avg": 0.0010,
}  # fmt: skip
STACKS = {"encoder": "entropy", "decoder": "entropy_de"}
# Methods of neighbours/WEMoE_multi_task_merging.py as the table names them, and what they look at besides the models.
MERGING = {
    "average": ("average", ""), "task_arithmetic": ("task arithmetic", ""), "ties": ("TIES", ""),
    "ties_sum": ("TIES, sum", ""), "dare": ("DARE", ""), "dare_ties": ("DARE, TIES", ""),
    "fisher": ("Fisher", "training examples"), "regmean": ("RegMean", "training examples"),
    "adamerging_task": ("AdaMerging, task-wise", "test inputs"), "adamerging_layer": ("AdaMerging", "test inputs"),
    "adamerging_plus": ("AdaMerging++", "test inputs"), "wemoe": ("WEMoE", "test inputs"),
    "ewemoe": ("E-WEMoE", "test inputs"), "wemoe_batch": ("WEMoE, routed by batch", "test inputs"),
    "wemoe_oracle": ("WEMoE, oracle", "test answers"),
}  # fmt: skip


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
        """Where records of these runs lie, for a table's column "from"."""
        seeds = [seed for seed, of_seed in self.records.items() if set(names) <= of_seed.keys()]
        if not seeds:
            return ""
        shown = str(seeds[0]) if len(seeds) == 1 else "{" + ",".join(map(str, seeds)) + "}"
        return " ".join(f"records/seed{shown}/{file_name(name)}" for name in names)

    def multi_task(self) -> list[str]:
        """The multi-task runs that are there, in the order of the paper's table 2, then the controls."""
        n, m = self.n, self.m
        order = [f"Baseline-{n}", f"Baseline-{m}", f"CAEM-{n}", f"CAEM-{n}-to-{m}", f"CAEM-{m}", f"CAEM-{n}-Avg"]
        order += [f"CAEM-{m}-Avg", f"Average-{n}", f"Baseline-{n}-same-compute"]
        return [name for name in order if self.get(name)]

    def pairs(self) -> list[str]:
        """The pairs of models that were compared."""
        return list(dict.fromkeys(name for of_seed in self.records.values() for name in of_seed if " + " in name))

    def main_score(self, task: str) -> str:
        """The name of a task's main score."""
        return next(
            record[f"{task}_data"]["main_score"]
            for of_seed in self.records.values()
            for record in of_seed.values()
            if f"{task}_data" in record
        )


def file_name(name: str) -> str:
    """The file of a run's record: no spaces, no slashes."""
    return name.replace(" + ", "+").replace(" ", ".") + ".json"


def read(folder: Path) -> Evidence:
    """The evidence in a report's folder. Raises UserError when there is none, or a file is damaged."""
    described = folder / "records" / "experiment.json"
    if not described.exists():
        raise UserError(f"{folder} holds no records/experiment.json; it is not a report that reproduce_tables.py wrote")
    facts = read_json(described)
    records = {
        seed: {
            path.stem.replace("+", " + ").replace(".", " "): read_json(path)
            for path in sorted((folder / "records" / f"seed{seed}").glob("*.json"))
        }
        for seed in facts["seeds"]
    }
    return Evidence(facts["scale"], facts["experts_num"], facts["larger_experts_num"], tuple(facts["tasks"]), records)


def all_tables(e: Evidence) -> list[Table]:
    """Every table that the records allow."""
    makers: list[Callable[[Evidence], Table]] = [
        scores, claimed, merging, entropies_after, entropies_by_task, allocation, soups, similarity, merged_only,
        deviations, best_on_test, entropy_by_length, cost,
    ]  # fmt: skip
    return [table for table in (make(e) for make in makers) if table.rows]


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
            row = {"configuration": label, "Overall": stat([overall_of(one) for one in records], 4)}
            for task in e.tasks:
                main = e.main_score(task)
                row[f"{task} {main}"] = stat([test_of(one)[task][main] for one in records])
            paper = PAPER_SCORES.get(label)
            if e.scale == "paper":
                columns = ("paper: Overall", *(f"paper: {task}" for task in e.tasks))
                row |= dict(zip(columns, paper or [None] * len(columns), strict=True))
            table.rows.append(row | {"from": e.source(name)})

    reference = f"reference-{e.n}"
    for label in dict.fromkeys(label for (one,) in e.get(reference) for label in one["rows"]):
        add(
            label,
            reference,
            lambda r, x=label: r["rows"][x]["test"],
            lambda r, x=label: r["rows"][x]["overall"]["test"],
        )
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
        start = _starts(e, name)
        if start:
            row = {"configuration": name, "Overall": stat([one["overall"]["test"] for one in start], 4)}
            for task in e.tasks:
                main = e.main_score(task)
                row[f"{task} {main}"] = stat([one["test"][task][main] for one in start])
            row["loss"] = stat([_mean_loss(one["validation"], e) for one in start], 3)
            table.rows.append(row | {"from": e.source(_start_name(e, name))})
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

    for method, (label, sees) in MERGING.items():
        name = f"merging-{e.n} {method}"
        if records := [one for (one,) in e.get(name)]:
            more = {"MB": stat([one["bytes"] / 1e6 for one in records], 1)}
            more["s to merge"] = stat([one["seconds_to_merge"] for one in records], 1)
            if "adaptation" in records[0]:
                more["s to adapt"] = stat([one["adaptation"]["seconds"] for one in records], 0)
            if "routing" in records[0]:
                more["mixed"] = stat([_at(one, "overall", "mixed") for one in records], 4)
            add(label, sees, name, records, _test_of(e), "overall", **more)
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


def _test_of(e: Evidence) -> Callable[[Any], dict[str, Any]]:
    return lambda one: {task: one[f"{task}_data"]["test"] for task in e.tasks}


def _at(record: Any, path: str, last: str) -> float | None:
    """The number under a path of keys, if it is there: without histories of the single-task models there is no Overall."""
    for key in path.split():
        record = record[key]
    return record.get(last)


def entropies_after(e: Evidence) -> Table:
    """Table 3, for all configurations."""
    table = Table(
        "entropies_after", "Expert-usage entropy after multi-task training (table 3)",
        "Normalised entropy on validation, mean over tasks and sparse layers: 1 is even use, 0 is one expert for all.",
    )  # fmt: skip
    for name in e.multi_task():
        row: dict[str, Any] = {"configuration": name}
        for stack in STACKS:
            row[stack] = stat([fmean(_entropy(one, stack, task) for task in e.tasks) for (one,) in e.get(name)], 4)
        if e.scale == "paper":
            paper = PAPER_ENTROPIES.get(name, (None, None))
            row |= {"paper: encoder": paper[0], "paper: decoder": paper[1]}
        table.rows.append(row | {"from": e.source(name)})
    return table


def entropies_by_task(e: Evidence) -> Table:
    """The complexity by which CAEM shares experts."""
    table = Table(
        "entropies_by_task", "Expert-usage entropy of the single-task models: the tasks' complexity",
        "Normalised entropy on validation, mean over sparse layers.",
    )  # fmt: skip
    for experts in (e.n, e.m):
        for task in e.tasks:
            name = f"single-task-{experts} {task}"
            if found := e.get(name):
                row: dict[str, Any] = {"experts": str(experts), "task": task}
                row |= {stack: stat([_entropy(one, stack, task) for (one,) in found], 4) for stack in STACKS}
                table.rows.append(row | {"from": e.source(name)})
    return table


def allocation(e: Evidence) -> Table:
    """Experts from each task in each sparse layer."""
    table = Table(
        "allocation", "Experts from each task",
        "In each sparse layer, a number a seed; and the weight with which each task enters all other tensors of the stack.",
    )  # fmt: skip
    for name in e.multi_task():
        found = [one for (one,) in e.get(name) if "weights" in one]
        for stack, key in (("encoder", "record_stay_num_experts_en"), ("decoder", "record_stay_num_experts_de")):
            for layer in range(len(found[0][key]) if found else 0):
                row = {"configuration": name, "stack": stack, "sparse layer": str(layer + 1)}
                for number, task in enumerate(e.tasks):
                    row[task] = ", ".join(str(one[key][layer][number]) for one in found)
                table.rows.append(row | {"from": e.source(name)})
            if found:
                row = {"configuration": name, "stack": stack, "sparse layer": "weight"}
                for number, task in enumerate(e.tasks):
                    row[task] = ", ".join(f"{one['weights'][stack][number]:.3f}" for one in found)
                table.rows.append(row | {"from": e.source(name)})
    return table


def soups(e: Evidence) -> Table:
    """Tables 4 and 5."""
    table = Table(
        "soups", "Soups of two models (tables 4 and 5)",
        "Overall of the equal average of two fine-tuned models, not trained further; what is kept of its parents' mean "
        "Overall; and the barrier: how far the loss on the line between them rises above the straight line, in nats a "
        "target token on validation, at its highest.",
    )  # fmt: skip
    for pair in e.pairs():
        if found := [(soup, a, b) for soup, a, b in e.get(pair, *pair.split(" + ")) if "soup" in soup]:
            row: dict[str, Any] = {"pair": pair, "Overall": stat([s["soup"]["overall"] for s, _, _ in found], 4)}
            for task in e.tasks:
                row[task] = stat([s["soup"]["test"][task][e.main_score(task)] for s, _, _ in found])
            row["kept"] = stat([_kept(*one) for one in found], 3)
            row["barrier"] = stat([s["line"]["barrier"] for s, _, _ in found if "line" in s], 3)
            if e.scale == "paper":
                row["paper: Overall"] = PAPER_SOUPS.get(pair)
            table.rows.append(row | {"from": e.source(pair)})
    return table


def similarity(e: Evidence) -> Table:
    """Figures 2 and 4 in numbers."""
    table = Table(
        "similarity", "Linear CKA between two models (figures 2 and 4)",
        "Mean over tasks and layers, and the lowest of them, before and after the joint fine-tuning; 1 is the same up to "
        "rotation and scale.",
    )  # fmt: skip
    for pair in e.pairs():
        found = [one["cka"] for (one,) in e.get(pair) if "cka" in one]
        for stack in STACKS if found else ():
            row: dict[str, Any] = {"pair": pair, "stack": stack}
            for when in ("before", "after"):
                values = [[v for task in e.tasks for v in one[when][task][stack]] for one in found]
                row |= {when: stat([fmean(v) for v in values], 4), f"lowest {when}": stat([min(v) for v in values], 4)}
            table.rows.append(row | {"from": e.source(pair)})
    return table


def deviations(e: Evidence) -> Table:
    """The audit: CAEM as the authors' code does it, one deviation at a time."""
    paper = f"CAEM-{e.n}"
    table = Table(
        "deviations", f"The released code's deviations, one at a time ({paper})",
        "Layers (encoder and decoder) whose allocation differs from the paper's reading; loss and Overall of the merged "
        "model before the joint fine-tuning, and Overall after it; differences within each seed.",
    )  # fmt: skip
    for label, name in (("paper", paper), ("counts", f"{paper}-counts"), ("projection", f"{paper}-projection")):
        found = e.get(paper, name)
        if found and (name != paper or e.get(f"{paper}-counts") or e.get(f"{paper}-projection")):
            row: dict[str, Any] = {"deviation": label}
            row["layers allocated otherwise"] = stat([_allocated_otherwise(a, b) for a, b in found], 1)
            row["merged: loss"] = stat([_mean_loss(b["before"]["validation"], e) for _, b in found], 3)
            row["merged: Overall"] = stat([b["before"]["overall"]["test"] for _, b in found], 4)
            row["Overall"] = stat([b["overall"]["test"] for _, b in found], 4)
            difference = [b["overall"]["test"] - a["overall"]["test"] for a, b in found]
            row["minus paper"] = "" if name == paper else claims.shown(difference)
            table.rows.append(row | {"from": e.source(name)})
    return table


def best_on_test(e: Evidence) -> Table:
    """What choosing the best epoch by the test scores adds to what is reported."""
    table = Table(
        "best_on_test", "The best epoch chosen on test, as the released code does",
        "Overall on test of the same runs, the epoch chosen by validation or by test.",
    )  # fmt: skip
    for name in e.multi_task():
        found = [(one, _overall_by_epoch(e, one, seed)) for seed, one in _by_seed(e, name)]
        found = [(one, values) for one, values in found if values]
        if found:
            by_test = [max(values) for _, values in found]
            by_validation = [one["overall"]["test"] for one, _ in found]
            row: dict[str, Any] = {"configuration": name, "by validation": stat(by_validation, 4)}
            row |= {"by test": stat(by_test, 4)}
            row["gain"] = stat([a - b for a, b in zip(by_test, by_validation, strict=True)], 4)
            table.rows.append(row | {"from": e.source(name)})
    return table


def entropy_by_length(e: Evidence) -> Table:
    """The audit: the same task and model, inputs cut to several lengths, counted both ways."""
    table = Table(
        "entropy_by_length", "Entropy against input length",
        "Single-task models on their validation inputs cut to a length: real tokens before the capacity cut (paper), or "
        "all positions of inputs padded to the limit, after it (released). Mean over sparse layers.",
    )  # fmt: skip
    for task in e.tasks:
        found = [one["rows"] for (one,) in e.get(f"usage {task}")]
        lengths = dict.fromkeys(row["input_length"] for rows in found for row in rows)
        for length in lengths:
            cell: dict[str, Any] = {"task": task, "cut to": length}
            same = [row for rows in found for row in rows if row["input_length"] == length]
            cell["mean tokens"] = round(fmean(row["mean_length"] for row in same), 1)
            for stack in STACKS:
                for counting in ("paper", "released"):
                    values = [fmean(row["entropy"][stack]) for row in same if row["counting"] == counting]
                    cell[f"{stack}, {counting}"] = stat(values, 4)
            table.rows.append(cell | {"from": e.source(f"usage {task}")})
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


def claimed(e: Evidence) -> Table:
    """The paper's claims with a verdict each."""
    n, m = e.n, e.m
    table = Table("claims", "The paper's claims at this scale", claims.RULE)

    def add(claim: str, verdict: str, numbers: str, *names: str) -> None:
        table.rows.append({"claim": claim, "verdict": verdict, "numbers": numbers, "from": e.source(*names)})

    def overall_above(better: str, worse: str, claim: str) -> None:
        differences = [a["overall"]["test"] - b["overall"]["test"] for a, b in e.get(better, worse)]
        if differences:
            add(claim, claims.above(differences), f"{better} - {worse}: {claims.shown(differences)}", better, worse)

    overall_above(f"CAEM-{n}", f"Baseline-{n}", "CAEM above Baseline on Overall")
    overall_above(f"CAEM-{n}-to-{m}", f"Baseline-{m}", "CAEM above Baseline on Overall")
    overall_above(f"CAEM-{m}", f"Baseline-{m}", "CAEM above Baseline on Overall")
    overall_above(f"CAEM-{n}", f"CAEM-{n}-Avg", "CAEM above CAEM-Avg")
    overall_above(f"CAEM-{m}", f"CAEM-{m}-Avg", "CAEM above CAEM-Avg")
    overall_above(f"CAEM-{n}", f"CAEM-{n}-to-{m}", f"{n} above {n}-to-{m}")
    overall_above(f"CAEM-{n}-to-{m}", f"CAEM-{m}", f"{n}-to-{m} above {m}")
    for experts in (n, m):
        names = [f"single-task-{experts} {task}" for task in e.tasks]
        found = e.get(*names)
        for stack in STACKS if found else ():
            rises, verdicts = [], []
            for i in range(len(names) - 1):
                low, high = e.tasks[i], e.tasks[i + 1]
                rise = [_entropy(one[i + 1], stack, high) - _entropy(one[i], stack, low) for one in found]
                rises.append(f"{high} - {low}: {claims.shown(rise)}")
                verdicts.append(claims.above(rise))
            claim = f"entropy {' < '.join(e.tasks)}: {stack}, {experts} experts"
            add(claim, claims.all_of(verdicts), "; ".join(rises), *names)
    pairs = [pair for pair in e.pairs() if any("soup" in one for (one,) in e.get(pair))]
    across = [pair for pair in pairs if pair.startswith(f"CAEM-{n}-to-{m} ")]
    within = [pair for pair in pairs if pair not in across]
    for group, claim, judge in (
        (
            within,
            "soups within a capacity survive (half or more of their parents' Overall is kept)",
            lambda kept: kept >= 0.5,
        ),
        (across, f"soups with {n}-to-{m} collapse (less than a tenth is kept)", lambda kept: kept < 0.1),
    ):
        shares = {pair: [_kept(*one) for one in e.get(pair, *pair.split(" + "))] for pair in group}
        kept = {pair: [share for share in of_pair if share is not None] for pair, of_pair in shares.items()}
        if any(kept.values()):
            answers = [judge(value) for values in kept.values() for value in values]
            verdict = claims.HELD if all(answers) else claims.NOT if not any(answers) else claims.UNKNOWN
            numbers = "; ".join(f"{pair}: {Stat(tuple(v), 3)}" for pair, v in kept.items() if v)
            add(claim, verdict, f"kept of the parents' Overall: {numbers}", *kept)
    pair = f"CAEM-{n}-to-{m} + CAEM-{n}"
    if found := [one["cka"] for (one,) in e.get(pair) if "cka" in one]:
        lowest = [min(v for task in e.tasks for v in one["after"][task]["encoder"]) for one in found]
        verdict = claims.HELD if min(lowest) > 0.999 else claims.NOT if max(lowest) <= 0.999 else claims.UNKNOWN
        numbers = f"lowest over tasks and layers after fine-tuning: {Stat(tuple(lowest), 4)}"
        add(f"the encoder of {n}-to-{m} equals that of CAEM-{n} (CKA > 0.999 in every layer)", verdict, numbers, pair)
    overall_above(
        f"CAEM-{n}", f"Baseline-{n}-same-compute", "not in the paper: CAEM above Baseline at the same compute"
    )
    overall_above(f"CAEM-{n}", f"Average-{n}", "not in the paper: CAEM above the plain average")
    return table


def _seeds(number: int) -> str:
    return "One seed." if number == 1 else f"Mean ± standard deviation over {number} seeds."


def _left_out(e: Evidence) -> str:
    """Which single-task scores of 0 Overall cannot divide by, in a sentence."""
    zero = [
        f"{task} ({experts} experts, seed {seed})"
        for experts in (e.n, e.m)
        for task in e.tasks
        for seed, record in _by_seed(e, f"single-task-{experts} {task}")
        if record[f"{task}_data"]["test"][e.main_score(task)] == 0
    ]
    return f" Left out, the single-task score being 0: {', '.join(zero)}." if zero else ""


def _by_seed(e: Evidence, name: str) -> list[tuple[int, Any]]:
    return [(seed, of_seed[name]) for seed, of_seed in e.records.items() if name in of_seed]


def _entropy(record: Any, stack: str, task: str) -> float:
    return fmean(record[STACKS[stack]][task])


def _mean_loss(scores: Any, e: Evidence) -> float:
    return fmean(scores[task]["loss"] for task in e.tasks)


def _start_name(e: Evidence, name: str) -> str:
    experts = e.m if name.endswith(str(e.m)) else e.n
    return f"reference-{experts}" if name.startswith("Baseline") else name


def _starts(e: Evidence, name: str) -> list[Any]:
    """What each seed's run started from: scores of the merged model, or for a Baseline of the pre-trained one."""
    found = [one for (one,) in e.get(_start_name(e, name))]
    if name.startswith("Baseline"):
        return [one["rows"]["base model, not fine-tuned"] for one in found]
    return [one["before"] for one in found]


def start_and_epochs(e: Evidence, name: str, value: Callable[[Any], float]) -> list[list[float]]:
    """For each seed `value` of the validation scores {task: scores} before training and after each epoch."""
    curves = []
    for of_seed in e.records.values():
        if {name, _start_name(e, name)} <= of_seed.keys():
            seed = Evidence(e.scale, e.n, e.m, e.tasks, {0: of_seed})
            epochs = range(len(of_seed[name]["selection"]))
            after = [{t: of_seed[name][f"{t}_data"]["validation"][epoch] for t in e.tasks} for epoch in epochs]
            curves.append([value(scores) for scores in (_starts(seed, name)[0]["validation"], *after)])
    return curves


def _allocated_otherwise(a: Any, b: Any) -> int:
    keys = ("record_stay_num_experts_en", "record_stay_num_experts_de")
    return sum(x != y for key in keys for x, y in zip(a[key], b[key], strict=True))


def _overall_by_epoch(e: Evidence, record: Any, seed: int) -> list[float]:
    """Overall on test after each epoch, where it was noted."""
    experts = record["experts_num"]
    ratios = []
    for task in e.tasks:
        goal = e.records[seed].get(f"single-task-{experts} {task}")
        main = e.main_score(task)
        if goal is None or not record[f"{task}_data"].get("test_epochs"):
            return []
        if (best := goal[f"{task}_data"]["test"][main]) > 0:
            ratios.append([scores[main] / best for scores in record[f"{task}_data"]["test_epochs"]])
    return [fmean(one) for one in zip(*ratios, strict=True)]


def _kept(soup: Any, a: Any, b: Any) -> float | None:
    """Overall of a soup as a share of its parents' mean; None where they have nothing to keep."""
    parents = fmean([a["overall"]["test"], b["overall"]["test"]])
    return soup["soup"]["overall"] / parents if parents > 0 else None
