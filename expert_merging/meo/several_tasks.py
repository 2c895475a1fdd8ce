"""Tables and figures of fine-tuning on several tasks together: scores, costs, the claims, and the paper's numbers beside."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from expert_merging.analysis import crossed_bootstrap as bootstrap
from expert_merging.meo import claims
from expert_merging.meo.run_records import Records, having, largest, listed, pairs_of, variants
from expert_merging.report.figures import plt, save_figure
from expert_merging.report.records import Groups, source
from expert_merging.report.tables import Table, stat

_PAPER_MOE, _PAPER_MEO = 82.6, 83.3  # the abstract's average over GLUE: vanilla MoE, and MEO at token level
_PAPER_FLOPS = 72.0, 28.6  # and its G operations of BERT-base, k = 4
_RERUN = {"sst2": (92.2, 92.3), "mrpc": (74.5, 76.2)}  # MoE, MEO of BERT-base-cased in SimSMoE's own runs of both


def together(folders: dict[str, Groups]) -> Groups:
    """The records of several tasks, {task: its groups}, in one: group -> "{task}_{run}" -> record."""
    groups: Groups = {}
    for task, of_task in folders.items():
        for group, runs in of_task.items():
            groups.setdefault(group, {}).update({f"{task}_{run}": record for run, record in runs.items()})
    return groups


def are_several(groups: Groups) -> bool:
    """Whether the records are of more than one task."""
    return len(_tasks(listed(groups))) > 1


def tables(groups: Groups) -> list[Table]:
    """Scores and costs; with every test example's score also the intervals, the claims and the paper's numbers."""
    records = listed(groups)
    made = [average_table(groups)]
    if _has_each(records):
        runs = claims.Runs(records)
        made += [_intervals(groups, runs), _claims(groups, runs), _beside_the_paper(groups, runs)]
    made += [_costs(groups), _equal(groups)]
    return [table for table in made if table.rows]


def _tasks(records: Records) -> list[str]:
    return list(dict.fromkeys(record["task"] for record in records))


def _has_each(records: Records) -> bool:
    return all("test_each" in record for record in records)


def _about(records: Records) -> str:
    return f"{records[0]['family']} on {', '.join(_tasks(records))}"


def _by_task(records: Records, name: str) -> dict[str, dict[int, dict[str, Any]]]:
    """{task: {seed: record}} of a variant."""
    of = having(records, name=name)
    return {task: {r["seed"]: r for r in of if r["task"] == task} for task in _tasks(records)}


def _source(groups: Groups, *names: str) -> str:
    """Where a row of these variants is from."""
    runs = [record["run"] for name in names for record in having(listed(groups), name=name)]
    return source(groups, *dict.fromkeys(runs))


def average_table(groups: Groups) -> Table:
    """A row a variant, a column a task's main score, and their mean over tasks a seed; no mean with a perplexity among them."""
    records = listed(groups)
    scores = {record["task"]: record["main_score"] for record in records}
    note = "Test scores, mean and standard deviation over seeds, and their mean over tasks of each seed that all tasks have."
    table = Table(f"{records[0]['family']}_average", f"MEO: {_about(records)}", note)
    for variant in variants(records):
        of = _by_task(records, variant["name"])
        values = {task: {s: r["scores"]["test"][scores[task]] for s, r in own.items()} for task, own in of.items()}
        row: dict[str, Any] = {"variant": variant["name"]}
        row |= {f"{task} {scores[task]}": stat(list(own.values())) for task, own in values.items()}
        if "perplexity" not in scores.values():
            shared = sorted(set.intersection(*map(set, values.values())))
            row["average"] = stat([fmean(own[seed] for own in values.values()) for seed in shared])
        table.rows.append(row | {"from": _source(groups, variant["name"])})
    return table


def _intervals(groups: Groups, runs: claims.Runs) -> Table:
    note = (
        f"Test accuracy [95% interval, bootstrap crossed over seeds and test examples, {bootstrap.METHOD}; of one seed over "
        "examples alone]."
    )
    table = Table("intervals", f"MEO: {_about(listed(groups))}, with intervals", note)
    for name in runs.seeds:
        cells = {task or "average": runs.estimate(name, task) for task in (*runs.tasks, "")}
        row = {task: f"{mean:.1f} [{low:.1f}, {high:.1f}]" for task, (mean, low, high) in cells.items()}
        table.rows.append({"variant": name, "seeds": len(runs.seeds[name]), **row, "from": _source(groups, name)})
    return table


def _claims(groups: Groups, runs: claims.Runs) -> Table:
    table = Table("claims", "MEO's claims", claims.RULE)
    for row in claims.judged(runs, claims.asked(variants(listed(groups)))):
        table.rows.append({**row, "from": _source(groups, *row["difference"].split(" - "))})
    return table


def _beside_the_paper(groups: Groups, runs: claims.Runs) -> Table:
    table = Table(
        "paper", "Beside the paper's numbers",
        "The paper: BERT-base, the average over GLUE and operations with the vocabulary's head, from its abstract (its tables "
        "were not at hand). SimSMoE: another paper's runs of both, at a level that it does not state. Here a smaller model, "
        "fewer examples and other tasks: compare differences and ratios.",
    )  # fmt: skip
    flops = {r["variant"]["name"]: r["flops"] / 1e9 for r in listed(groups)}

    def add(what: str, paper: str, here: str, *names: str) -> None:
        table.rows.append({"what": what, "paper": paper, "here": here, "from": _source(groups, *names)})

    for variant in variants(listed(groups)):
        if variant["how"] != "meo" or not runs.shared(variant["name"], moe := variant["name"].replace("MEO", "MoE")):
            continue
        name, k, level = variant["name"], variant["k"], variant["level"]
        difference = runs.difference(name, moe)
        if level == "token":
            for one, score in ((moe, _PAPER_MOE), (name, _PAPER_MEO)):
                add(f"{one}, average", f"{score} (GLUE)", _in_words(runs.estimate(one)), one)
            paper = f"{_PAPER_MEO - _PAPER_MOE:+.1f}"
            add(f"{name} - MoE, average", paper, _in_words(difference, sign="+"), name, moe)
            for task in (task for task in runs.tasks if task in _RERUN):
                paper = f"{_RERUN[task][1] - _RERUN[task][0]:+.1f} (SimSMoE)"
                add(f"{name} - MoE, {task}", paper, _in_words(runs.difference(name, moe, task), sign="+"), name, moe)
        elif k == 4:
            paper = f"{_PAPER_FLOPS[0]} / {_PAPER_FLOPS[1]} = {_PAPER_FLOPS[0] / _PAPER_FLOPS[1]:.2f}"
            here = f"{flops[moe]:.2f} / {flops[name]:.2f} = {flops[moe] / flops[name]:.2f}"
            add(f"G operations, MoE / MEO, {level} k={k}", paper, here, name, moe)
    return table


def _in_words(estimate: tuple[float, float, float], sign: str = "") -> str:
    mean, low, high = (round(value, 1) + 0.0 for value in estimate)  # -0.0 would keep its sign
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _costs(groups: Groups) -> Table:
    """What does not depend on the task but for lengths and the head: means over tasks."""
    records = listed(groups)
    where = "" if records[0]["device"] == "cuda" else "CPU "
    lengths = " or ".join(str(length) for length in sorted({record["flops_length"] for record in records}))
    note = (
        f"Means over those of {', '.join(_tasks(records))} that a variant has run. Operations counted by "
        f"torch.utils.flop_counter in a forward pass of one sequence of {lengths} tokens; the median training step of each "
        "run, optimizer and all; what a training pass of one batch keeps for its backward pass. x: by the dense model's on the "
        "same tasks."
    )
    table = Table("costs", "MEO: what each variant costs", note)
    dense = next((one["name"] for one in variants(records) if one["how"] == "dense"), "")
    for variant in variants(records):
        of = {task: own for task, own in _by_task(records, variant["name"]).items() if own}
        steps = _steps(of)
        every = [record for own in of.values() for record in own.values()]
        of_dense = {task: own for task, own in _by_task(records, dense).items() if task in of}
        alike = (
            [record["flops"] for own in of_dense.values() for record in own.values()] if all(of_dense.values()) else []
        )
        flops, base = fmean(r["flops"] for r in every), fmean(alike) if alike else None
        base_steps = _steps(of_dense) if alike else []
        table.rows.append({
            "variant": variant["name"], "MFLOPs a sequence": flops / 1e6, "x": flops / base if base else None,
            f"{where}ms a training step": stat(steps, 1),
            "x, time": fmean(steps) / fmean(base_steps) if steps and base_steps else None,
            "parameters, M": fmean(r["parameters"] for r in every) / 1e6,
            "kept for backward, MB": fmean(r["kept_bytes"] for r in every) / 1e6, "from": _source(groups, variant["name"]),
        })  # fmt: skip
    return table


def _steps(of: dict[str, dict[int, dict[str, Any]]]) -> list[float]:
    """Milliseconds a step, the mean over tasks of each seed that all tasks have timed."""
    timed = [{seed: 1000 * r["step_seconds"] for seed, r in own.items() if r["step_seconds"]} for own in of.values()]
    return [fmean(own[seed] for own in timed) for seed in sorted(set.intersection(*map(set, timed)))]


def _equal(groups: Groups) -> Table:
    """How far vanilla MoE and MEO are apart where they compute the same."""
    records = listed(groups)
    note = (
        "Largest differences over tasks and seeds between a MoE and a MEO run of the same seed: both compute the same."
    )
    table = Table("equal", "MoE against MEO, the same function", note)
    for variant in (v for v in variants(records) if v["how"] == "moe" and v["level"] != "token"):
        pairs = [
            pair for task in _tasks(records) for pair in pairs_of([r for r in records if r["task"] == task], variant)
        ]
        if not pairs:
            continue
        apart = [np.abs(np.subtract(a["step_losses"], b["step_losses"])) for a, b in pairs]
        name = variant["name"]
        table.rows.append({
            "MoE and MEO": name.removeprefix("MoE "), "loss of step 1": largest(d[:1].max() for d in apart),
            "steps 1-10": largest(d[:10].max() for d in apart), "all steps": largest(d.max() for d in apart),
            "test loss": largest(abs(a["scores"]["test"]["loss"] - b["scores"]["test"]["loss"]) for a, b in pairs),
            "test score": largest(abs(_main(a) - _main(b)) for a, b in pairs), "runs": len(pairs),
            "from": _source(groups, name, name.replace("MoE", "MEO")),
        })  # fmt: skip
    return table


def _main(record: dict[str, Any]) -> float:
    return record["scores"]["test"][record["main_score"]]


# ---------------------------------------------------------------- figures


def draw(groups: Groups, folder: Path) -> dict[str, str]:
    """Draw scores and costs, and the claims, into `folder`; returns {name of a figure: caption}."""
    records = listed(groups)
    if not _has_each(records):
        return {}
    runs = claims.Runs(records)
    if not runs.seeds:  # no variant has a seed that all tasks have
        return {}
    _draw_variants(records, runs, folder / "variants.png")
    captions = {
        "variants": "The mean accuracy over tasks with its 95% interval, operations, and time of a training step."
    }
    if rows := claims.judged(runs, claims.asked(variants(records))):
        _draw_claims(runs, rows, folder / "claims.png")
        captions["claims"] = f"Each claim's difference with its 95% interval; grey: within {claims.MARGIN:g} point."
    return captions


def _draw_variants(records: Records, runs: claims.Runs, path: Path) -> None:
    names = list(runs.seeds)
    panels: dict[str, Callable[[str], float]] = {
        "GFLOPs a sequence": lambda name: fmean(r["flops"] for r in having(records, name=name)) / 1e9,
        "ms a training step": lambda name: fmean(_steps(_by_task(records, name)) or [float("nan")]),
    }
    figure, axes = plt.subplots(1, 3, figsize=(10, 0.8 + 0.28 * len(names)), sharey=True, width_ratios=(2, 1, 1))
    places = range(len(names))
    _whiskers(axes[0], places, [runs.estimate(name) for name in names])
    axes[0].set(title="accuracy, %, mean over tasks", yticks=places, yticklabels=names)
    axes[0].invert_yaxis()
    for panel, (title, value) in zip(axes[1:], panels.items(), strict=True):
        panel.barh(places, [value(name) for name in names], height=0.6, color="C0")
        panel.set(title=title)
    save_figure(figure, path)


def _draw_claims(runs: claims.Runs, rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.28 * len(rows)))
    axes.axvspan(-claims.MARGIN, claims.MARGIN, color="0.9", lw=0)
    axes.axvline(0, color="0.4", lw=0.8)
    places = range(len(rows))
    for number, claim in enumerate(dict.fromkeys(row["claim"] for row in rows)):
        own = [place for place in places if rows[place]["claim"] == claim]
        estimates = [runs.difference(*rows[place]["difference"].split(" - ")) for place in own]
        _whiskers(axes, own, estimates, color=f"C{number}", label=claim)
    axes.set(xlabel="difference in accuracy, points", yticks=places, yticklabels=[row["difference"] for row in rows])
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    save_figure(figure, path)


def _whiskers(axes, places: Sequence[int], estimates: Sequence[tuple[float, float, float]], **look: Any) -> None:
    mean, low, high = np.array(estimates).T
    axes.errorbar(
        mean, places, xerr=(np.maximum(mean - low, 0), np.maximum(high - mean, 0)), fmt="o", ms=4, capsize=2, **look
    )
