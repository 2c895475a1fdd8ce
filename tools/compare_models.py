"""Two finished runs side by side: their soup, the losses on the line between them, and their layers' likeness (CKA).

Reads   DATA_DIR/{task}; the runs' histories in PICKLE_PATH and models in MODEL_SAVE_PATH, for CKA also the models they
        began with: {name}_merged there, or the pre-trained model in BASE_MODEL_PATH; for soups the single-task histories
        in SOURCE_PICKLE_PATH, by which Overall is measured.
Writes  PICKLE_PATH/pairs/{first}__{second}.json.
Takes   at tiny about a minute on 2 CPU cores. Interrupted, it goes on with the measure it was at.
"""

from expert_merging.run.constants import run

first = "CAEM_[8|8]"  # a finished run: {current_case_name}_[{experts}] or ..._[{source experts}|{target experts}]
second = "Baseline_[8]"  # another one; with other numbers of experts for cka only
measures = ("soup", "line", "cka")  # soup | line | cka
line_points = 5  # between the two ends of the line
cka_examples = 0  # of each task's validation; 0 takes all


def history_of(c, name):
    """The history of a run. Raises UserError, naming the command that makes it, where there is none."""
    import re
    import shlex

    from expert_merging.core.errors import UserError
    from expert_merging.run import results

    parts = re.fullmatch(r"([^/]+)_\[(\d+)(?:\|(\d+))?\]", name)
    if parts is None:
        raise UserError(f"{name!r} is not the name of a run, which reads like CAEM_[8|8] or Baseline_[8]")
    case, source, target = parts.groups()
    kind = "CAEM" if target else "Baseline"
    words = ["python", f"{kind}_multi_task_finetune.py", "--scale", c.scale]
    words += ["--source_experts_num", source, "--target_experts_num", target] if target else ["--experts_num", source]
    words += ["--current_case_name", case] if case != kind else []
    return results.load(c.PICKLE_PATH, name, shlex.join([*words, "--seed", str(c.seed)]))


def check_constants(c):
    """Raises UserError for a measure that does not exist, and for numbers below 0."""
    from expert_merging.core.errors import UserError

    if unknown := [measure for measure in c.measures if measure not in ("soup", "line", "cka")]:
        raise UserError(f"measures has {unknown[0]!r}; it may have soup, line and cka")
    for name in ("line_points", "cka_examples"):
        if getattr(c, name) < 0:
            raise UserError(f"{name} is {getattr(c, name)}; it must be 0 or more")


def main(c):
    import time
    from pathlib import Path

    from expert_merging.data.tasks import get_task
    from expert_merging.switch.models import find_base, require_patch

    check_constants(c)
    for task in c.task_types:
        get_task(task)
    require_patch()
    names = c.first, c.second
    pasts = [history_of(c, name) for name in names]
    for past in pasts:
        if "cka" in c.measures and "ancestor" in past["identity"]:
            find_base(c, past["experts_num"])

    from tqdm.auto import tqdm

    from expert_merging.analysis import soups_and_lines
    from expert_merging.core.files import read_json, write_json
    from expert_merging.core.hub import load_tokenizer
    from expert_merging.data import features
    from expert_merging.run import provenance, results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.training import finetuning, overall

    # Both runs, checked to fit together; what has been measured is not measured again.
    accelerator = make_accelerator(c)
    hashes = finetuning.data_hashes(c, c.task_types)
    runs = tuple(soups_and_lines.open_run(c, name, past, hashes) for name, past in zip(names, pasts, strict=True))
    tokenizer = load_tokenizer(str(runs[0].folder), "MODEL_SAVE_PATH")
    data = {task: features.load(task, c, tokenizer) for task in c.task_types}
    if {"soup", "line"} & set(c.measures):
        soups_and_lines.check_averages(*runs)
    goals = None
    if "soup" in c.measures:
        experts = runs[0].config.num_experts
        goals = overall.single_task_goals(c.SOURCE_PICKLE_PATH.format(experts=experts), c.task_types, experts, c)
    identity = results.identity(
        c, weights={one.name: one.weights_sha256 for one in runs}, data=hashes, goals=goals,
        starts={one.name: soups_and_lines.start_sha256(one) for one in runs} if "cka" in c.measures else None,
    )  # fmt: skip
    folder, name = Path(c.PICKLE_PATH) / "pairs", f"{c.first}__{c.second}"
    work = folder / f"{name}.run.json"
    if results.finished(folder, name, identity, work):
        accelerator.print(f"{folder}/{name}.json is there already; remove it to compare again")
        return
    for one in runs:
        if "cka" in c.measures and one.start is None:
            soups_and_lines.load_start(c, one)  # another base model is refused now, not after hours

    kept = read_json(work) if work.exists() else {}
    found, seconds = (kept["found"], kept["seconds"]) if kept.get("identity") == identity else ({}, 0.0)
    rounds = {"soup": 1, "line": c.line_points + 2, "cka": 2}
    with tqdm(
        total=len(data) * sum(rounds[measure] for measure in set(c.measures) - set(found)),
        desc=f"{c.first} and {c.second}", unit="task", dynamic_ncols=True, disable=not accelerator.is_main_process,
    ) as bar:  # fmt: skip
        for measure in c.measures:
            if measure in found:
                continue
            started = time.monotonic()
            if measure == "soup":
                found[measure] = soups_and_lines.soup(c, accelerator, runs, tokenizer, data, goals, bar.update)
            else:
                measured = soups_and_lines.line if measure == "line" else soups_and_lines.cka
                found[measure] = measured(c, accelerator, runs, tokenizer, data, bar.update)
            seconds += time.monotonic() - started
            if accelerator.is_main_process:
                write_json(work, {"identity": identity, "found": found, "seconds": seconds})
    if accelerator.is_main_process:
        about = {"command": provenance.command(), "versions": provenance.versions(), "identity": identity}
        about |= {"seconds": round(seconds, 1), "first": c.first, "second": c.second}
        write_json(folder / f"{name}.json", about | {measure: found[measure] for measure in c.measures})
        work.unlink()

    if "soup" in found:
        for label, scored in (("soup", found["soup"]), *zip(names, found["soup"]["parents"].values(), strict=True)):
            accelerator.print(f"{label}: {overall.scores_line(scored['test'], scored['overall'])}")
    if "line" in found:
        losses = " ".join(f"{value:.3f}" for value in found["line"]["mean"])
        accelerator.print(
            f"mean loss on the line {losses}: barrier {found['line']['barrier']:.4f} at {found['line']['at']:.2f}"
        )
    for when, tasks in found.get("cka", {}).items():
        for task, stacks in tasks.items():
            values = ", ".join(f"{stack} {' '.join(f'{v:.4f}' for v in layers)}" for stack, layers in stacks.items())
            accelerator.print(f"CKA {when} fine-tuning, {task}: {values}")


if __name__ == "__main__":
    run(main, globals())
