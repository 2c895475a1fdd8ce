"""What tools/compare_models.py does with two finished runs: open them, check that they fit, and take each measure once."""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from expert_merging.core.bars import bar as progress_bar
from expert_merging.core.errors import UserError, at_least
from expert_merging.core.hub import load_tokenizer
from expert_merging.run import results

if TYPE_CHECKING:  # torch and transformers come with it
    from expert_merging.analysis.soups_and_lines import Run

MEASURES = ("soup", "line", "cka")


@dataclass(frozen=True)
class Pair:
    """Two runs that fit together, their tasks' features, what Overall divides by (for soups), and what the comparison
    depends on."""

    runs: tuple["Run", "Run"]
    tokenizer: Any
    data: dict[str, Any]
    goals: dict[str, dict[str, float]] | None
    identity: dict[str, Any]


def check_constants(c: SimpleNamespace) -> None:
    """Raises UserError for a measure that does not exist, and for numbers below 0."""
    if unknown := [measure for measure in c.measures if measure not in MEASURES]:
        raise UserError(f"measures has {unknown[0]!r}; it may have soup, line and cka")
    at_least(c, 0, "line_points", "cka_examples")


def history_of(c: SimpleNamespace, name: str) -> dict[str, Any]:
    """The history of a run. Raises UserError, naming the command that makes it, where there is none."""
    case, source, target = results.parse_run_name(name)
    kind = "CAEM" if target else "Baseline"
    words = ["python", f"{kind}_multi_task_finetune.py", "--scale", c.scale]
    sizes = {"source_experts_num": source, "target_experts_num": target} if target else {"experts_num": source}
    words += [word for size, value in sizes.items() for word in (f"--{size}", str(value))]
    words += ["--current_case_name", case] if case != kind else []
    return results.load(f"{c.PICKLE_PATH}/{name}.json", shlex.join([*words, "--seed", str(c.seed)]))


def open_pair(c: SimpleNamespace, pasts: list[dict[str, Any]]) -> Pair:
    """The runs `c.first` and `c.second`, whose histories are `pasts`. Raises UserError where they do not fit together."""
    from expert_merging.analysis import soups_and_lines
    from expert_merging.data import features
    from expert_merging.training import finetuning, overall
    from expert_merging.training.families import family_of

    hashes, names = finetuning.data_hashes(c, c.task_types), (c.first, c.second)
    first, second = (soups_and_lines.open_run(c, name, past, hashes) for name, past in zip(names, pasts, strict=True))
    runs = (first, second)
    tokenizer = load_tokenizer(str(runs[0].folder), "MODEL_SAVE_PATH")
    data = {task: features.load(task, c, tokenizer) for task in c.task_types}
    if {"soup", "line"} & set(c.measures):
        soups_and_lines.check_averages(*runs)
    goals = None
    if "soup" in c.measures:
        experts = family_of(runs[0].config).experts_of(runs[0].config)
        goals = overall.single_task_goals(c.SOURCE_PICKLE_PATH.format(experts=experts), c.task_types, experts, c)
    identity = results.identity(
        c, weights={run.name: run.weights_sha256 for run in runs}, data=hashes, goals=goals,
        starts={run.name: soups_and_lines.start_sha256(run) for run in runs} if "cka" in c.measures else None,
    )  # fmt: skip
    return Pair(runs, tokenizer, data, goals, identity)


def measure(c: SimpleNamespace, accelerator, pair: Pair, work: Path) -> dict[str, Any]:
    """{measure: what it found, for each of `c.measures`, "seconds": number}. What has been measured stands in `work`
    meanwhile, and is not measured again."""
    from expert_merging.analysis import soups_and_lines

    for run in pair.runs:
        if "cka" in c.measures and run.start is None and not soups_and_lines.left_only_its_end(run):
            soups_and_lines.load_start(c, run)  # another base model is refused now, not after hours
    kept = results.part(work, pair.identity) or {"found": {}, "seconds": 0.0}
    found, seconds = kept["found"], kept["seconds"]
    rounds = {"soup": 1, "line": c.line_points + 2}
    if "cka" in c.measures:
        rounds["cka"] = 1 if any(map(soups_and_lines.left_only_its_end, pair.runs)) else 2
    with progress_bar(
        total=len(pair.data) * sum(rounds[name] for name in set(c.measures) - set(found)),
        desc=f"{c.first} and {c.second}", unit="task", disable=not accelerator.is_main_process,
    ) as bar:  # fmt: skip
        for name in c.measures:
            if name in found:
                continue
            started, given = time.monotonic(), (c, accelerator, pair.runs, pair.tokenizer, pair.data)
            if name == "soup":
                assert pair.goals is not None  # `open_pair` has them where soups are asked for
                found[name] = soups_and_lines.soup(*given, pair.goals, bar.update)
            else:
                found[name] = (soups_and_lines.line if name == "line" else soups_and_lines.cka)(*given, bar.update)
            seconds += time.monotonic() - started
            if accelerator.is_main_process:
                results.save(work, pair.identity, {"found": found, "seconds": seconds})
    return {"seconds": round(seconds, 1), **{name: found[name] for name in c.measures}}


def lines(names: tuple[str, str], found: dict[str, Any]) -> list[str]:
    """What was measured of the runs `names`, for people to read."""
    from expert_merging.training import overall

    said = []
    if "soup" in found:
        for label, scored in (("soup", found["soup"]), *zip(names, found["soup"]["parents"].values(), strict=True)):
            said.append(f"{label}: {overall.scores_line(scored['test'], scored['overall'])}")
    if "line" in found:
        line = found["line"]
        losses = " ".join(f"{value:.3f}" for value in line["mean"])
        said.append(f"mean loss on the line {losses}: barrier {line['barrier']:.4f} at {line['at']:.2f}")
    for when, tasks in found.get("cka", {}).items():
        for task, stacks in tasks.items():
            values = ", ".join(f"{stack} {' '.join(f'{v:.4f}' for v in layers)}" for stack, layers in stacks.items())
            said.append(f"CKA {when} fine-tuning, {task}: {values}")
    return said
