"""How neighbours/WEMoE_text.py merges, chooses coefficients, adapts and measures: one seed's models, and a record a run."""

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from expert_merging.core.bars import bar as progress_bar
from expert_merging.core.errors import UserError
from expert_merging.core.hub import weights_sha256
from expert_merging.data import text_tasks
from expert_merging.data.docstring_reader import corpus_hash
from expert_merging.data.text_tasks import Row, TextTask
from expert_merging.run import results
from expert_merging.wemoe import records, text_encoder, text_plan, text_training
from expert_merging.wemoe.classification import (
    STATIC,
    Settings,
    build,
    changed,
    measured,
    merged_model,
    model_info,
    run_method,
)
from expert_merging.wemoe.scoring import Task, evaluate
from expert_merging.wemoe.text_corruptions import CORRUPTIONS, STRENGTHS, corrupted
from expert_merging.wemoe.text_encoder import TextEncoder, regrouped
from expert_merging.wemoe.text_plan import Run, adapts, coefficient

# What a record follows from, beside the models; by the constants of the registry's methods, too. What routes by batch gives
# other answers in other batches.
DEPENDS_ON = (
    *text_training.TRAINING, "test_texts", "select_texts", "robust_texts", "grid", "lam", "adapt_lr",
    "adamerging_lr", "adapt_steps", "adapt_batch_size", "guard", "guard_floor", "guard_window", "statistics_examples",
    "general_tasks", "scoring_batch",
)  # fmt: skip


@dataclass
class Seed:
    """The models and tasks of one seed, on the device to compute on."""

    c: SimpleNamespace
    number: int
    tasks: dict[str, TextTask]
    merged: tuple[str, ...]
    tokenizer: Any
    device: torch.device
    heads: dict[str, torch.Tensor]
    base: nn.Module
    folders: dict[str, Path]  # of the fine-tuned models, "multi_task" among them
    validation: dict[str, float]  # accuracy of the separate models
    identity: dict[str, Any]
    cached: dict[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def tensors(self, name: str) -> Mapping[str, torch.Tensor]:
        """Of a fine-tuned model, by the names of `base`."""
        if name not in self.cached:
            self.cached[name] = TextEncoder(regrouped(text_encoder.load(self.folders[name]))).state_dict()
        return self.cached[name]

    def experts(self, names: Sequence[str]) -> dict[str, Mapping[str, torch.Tensor]]:
        return {name: self.tensors(name) for name in names}

    def rows(self, name: str, split: str) -> list[Row]:
        """What is tested on, adapted to, and by which coefficients are chosen: the same for all seeds; for training a sample
        of the seed's own."""
        if split == "train":
            return self.tasks[name].sample("train", self.c.train_texts, self.number)
        most = {
            "test": self.c.test_texts,
            "validation": self.c.validation_texts,
            "select": self.c.select_texts,
        }
        return self.tasks[name].sample("test" if split == "test" else "validation", most[split])

    def inputs(self, names: Sequence[str], split: str) -> list[Task]:
        """Tasks with those of a split that `rows` takes."""
        return [self.task(name, self.rows(name, split)) for name in names]

    def task(self, name: str, rows: Sequence[Row]) -> Task:
        return text_encoder.task_of(name, rows, self.heads[name], self.tokenizer, self.c).to(self.device)


def open_seed(
    c: SimpleNamespace, accelerator, seed: int, tasks: dict[str, TextTask], merged: tuple[str, ...], tokenizer
) -> Seed:
    """Heads and fine-tuned models of a seed, made where they are not there."""
    device = accelerator.device
    heads = {name: text_training.head_of(c, seed, task, tokenizer, device) for name, task in tasks.items()}
    folders: dict[str, Path] = {}
    validation: dict[str, float] = {}
    for name in merged:
        folders[name], told = text_training.finetuned(c, accelerator, seed, name, [tasks[name]], heads, tokenizer)
        validation |= told["validation"]
    if "multi_task" in c.methods:
        every = [tasks[name] for name in merged]
        folders["multi_task"], _ = text_training.finetuned(c, accelerator, seed, "multi_task", every, heads, tokenizer)
    base = TextEncoder(regrouped(text_encoder.load(c.ENCODER))).eval().requires_grad_(False)
    return Seed(
        c,
        seed,
        tasks,
        merged,
        tokenizer,
        device,
        heads,
        base.to(device),
        folders,
        validation,
        identity_of(c, tasks, merged),
    )


def identity_of(c: SimpleNamespace, tasks: Mapping[str, TextTask], merged: Sequence[str]) -> dict[str, Any]:
    """What every record of an experiment follows from; seeds share it."""
    data = {name: corpus_hash(task.rows) for name, task in tasks.items()}
    return results.identity(c, (*DEPENDS_ON, *changed(c)), merged=list(merged), data=data, encoder=c.encoder_sha256)


# ---------------------------------------------------------------- coefficients


def chosen_coefficient(seed: Seed, method: str, names: Sequence[str]) -> dict[str, Any]:
    """{"chosen", "curve": [[coefficient, mean relative accuracy], ..]} of a method that adds coefficient times something.

    The rule, the same for all: of `grid` the one with the highest mean over tasks of accuracy / accuracy of the separate model
    on `select_texts` of each task's validation; of equal ones the smallest. What is added is computed once.
    """
    c = seed.c
    path = text_training.seed_folder(c, seed.number) / "coefficients" / f"{method}_{len(names)}.json"
    identity = seed.identity | {"method": method, "tasks": list(names), "seed": seed.number}
    if (kept := results.part(path, identity)) is not None:
        return kept
    constant = coefficient(method)
    assert constant is not None
    s = settings(seed, {constant: 1.0})
    whole = build(method, seed.base, list(seed.experts(names).values()), s).state_dict()
    start, model = seed.base.state_dict(), copy.deepcopy(seed.base)
    tasks = seed.inputs(names, "select")
    curve = []
    for value in progress_bar(sorted(c.grid), f"seed {seed.number}: coefficient of {method}", leave=False):
        model.load_state_dict({
            name: tensor + value * (whole[name] - tensor) if tensor.is_floating_point() else tensor
            for name, tensor in start.items()
        })  # fmt: skip
        found = evaluate(model, tasks, s)
        relative = [found[name]["accuracy"] / max(seed.validation[name], 1e-9) for name in names]
        curve.append([value, round(sum(relative) / len(relative), 6)])
    best = max(curve, key=lambda point: (point[1], -point[0]))[0]
    results.save(path, identity, {"chosen": best, "curve": curve})
    return {"chosen": best, "curve": curve}


def settings(seed: Seed, constants: Mapping[str, float] | None = None, **more: Any) -> Settings:
    """Of the methods, with other values of some constants of theirs."""
    s = Settings.of(
        seed.c, seed=seed.number, eval_batch_size=seed.c.scoring_batch, logit_scale=1.0, modules=text_encoder.FEED_FORWARD,
        attention=text_encoder.ATTENTION,
    )  # fmt: skip
    s.constants = {**s.constants, **(constants or {})}
    return replace(s, **({"lam": (constants or {}).get("lam", s.lam)} | more))


def run_settings(seed: Seed, run: Run) -> tuple[Settings, dict[str, Any]]:
    """(the settings of a run, what to note of its coefficient). What adapts begins from task arithmetic, and takes its."""
    more: dict[str, Any] = {"mixed": run.part in ("main", "mixed")} | ({"guard": run.guard} if run.guard else {})
    of = "task_arithmetic" if adapts(run.method) else run.method
    constant = coefficient(of)
    if constant is None:
        return settings(seed, **more), {}
    if not run.chosen:
        return settings(seed, **more), {"coefficient": getattr(seed.c, constant)}
    found = chosen_coefficient(seed, of, run.tasks)
    return settings(seed, {constant: found["chosen"]}, **more), {
        "coefficient": found["chosen"],
        "curve": found["curve"],
    }


# ---------------------------------------------------------------- runs


def do(seed: Seed, run: Run) -> dict[str, Any]:
    """The record of a run."""
    c = seed.c
    group, folder = f"seed{seed.number}", Path(c.WEMOE_TEXT_DIR)
    facts = {"part": run.part, "tasks": list(run.tasks), "adapted_to": run.adapt_to if adapts(run.method) else ""}
    kept = text_training.seed_folder(c, seed.number) / "adapted" / f"{run.method}.safetensors"
    if run.part == "guard":
        # In a run that the guard has not stopped, it has changed nothing.
        main = results.load(records.path_of(folder, group, f"main.{run.method}"), "the part main")
        if c.guard == "rollback" or not main["adaptation"]["collapsed"]:
            own = ("method", "group", "seed", "identity", "command", "versions", "part")
            return {key: value for key, value in main.items() if key not in own} | facts | {"as_main": True}
    s, noted = run_settings(seed, run)
    if run.part == "robustness":
        return facts | noted | {"corrupted": robustness(seed, run, s, kept)}
    unseen = [name for name in seed.tasks if name not in run.tasks] if run.part == "generalization" else []
    tasks = seed.inputs([*run.tasks, *unseen], "test")
    if run.method == "multi_task":
        model = plain(seed, "multi_task")
        found = measured(model, tasks, s, run.method)
        found["model_info"] = model_info(model)
    else:
        more: dict[str, Any] = {
            "checkpoint": folder / f"{group}_{run.name}.adapting", "identity": seed.identity | noted,
            "statistics_tasks": seed.inputs(run.tasks, "train") if has_statistics(run.method) else None,
            "keep": kept if run.part == "main" else None,
            "window": c.guard_window,
        }  # fmt: skip
        seen = seed.inputs(run.tasks, run.adapt_to)
        more = {} if run.method == "individual" else more
        found, _ = run_method(run.method, seed.base, seed.experts(run.tasks), tasks, seen, s, **more)
    return found | facts | noted | {"unseen": unseen}


def has_statistics(method: str) -> bool:
    return method in STATIC and bool(STATIC[method].statistics)


def plain(seed: Seed, name: str) -> nn.Module:
    """A fine-tuned model by itself."""
    model = copy.deepcopy(seed.base)
    model.load_state_dict(dict(seed.tensors(name)))
    return model


def robustness(seed: Seed, run: Run, s: Settings, kept: Path) -> dict[str, dict[str, float]]:
    """{corruption and strength: {task: accuracy}} of the part main's model on spoilt texts, and on the same as they are. What
    adapts keeps what it learnt from clean texts."""
    if run.method == "individual":
        model_of = functools.partial(plain, seed)
    else:
        if run.method == "multi_task":
            model = plain(seed, "multi_task")
        else:
            if adapts(run.method) and not kept.exists():
                raise UserError(f"{kept} is gone; remove the records of the part main, which make it, and run it again")
            tasks = seed.inputs(run.tasks, "test")
            reuse = kept if adapts(run.method) else None
            model, _ = merged_model(run.method, seed.base, seed.experts(run.tasks), tasks, s, reuse=reuse)
        model_of = functools.partial(_same, model)
    found: dict[str, dict[str, float]] = {}
    ways = [("clean", 0), *((name, strength) for name in CORRUPTIONS for strength in STRENGTHS)]
    for way, strength in progress_bar(ways, f"seed {seed.number}: robustness of {run.method}", leave=False):
        label = f"{way} {strength}" if strength else way
        tasks = [seed.task(name, spoilt(seed.c, seed.tasks[name], way, strength)) for name in run.tasks]
        found[label] = {
            task.name: evaluate(model_of(task.name), [task], s)[task.name]["accuracy"] for task in tasks
        }  # fmt: skip
    return found


def _same(model: nn.Module, name: str) -> nn.Module:
    return model


def spoilt(c: SimpleNamespace, task: TextTask, way: str, strength: int) -> list[Row]:
    """The first `robust_texts` of the test sample; the same for every seed and method."""
    rows = task.sample("test", c.test_texts)[: c.robust_texts or None]
    if not strength:
        return rows

    def of(text: str | None, place: str) -> str | None:
        return None if text is None else corrupted(text, way, strength, place)

    return [
        Row(of(row.text, f"{task.name} {i}") or row.text, of(row.text2, f"{task.name} {i} second"), row.label)
        for i, row in enumerate(rows)
    ]


# ---------------------------------------------------------------- what the script asks for


def inputs_of(c: SimpleNamespace) -> tuple[dict[str, TextTask], tuple[str, ...], Any]:
    """(tasks, the names of those to merge, the tokenizer). Notes in `c` the hash of the encoder's weights, and which tasks to
    merge are trained on others' test texts, of which it warns. Raises UserError for what is wrong with any of them."""
    folders, unseen = [folder for folder in c.TASKS_PATH if folder], [name for name in c.unseen_tasks if name]
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would say of every encoder that its pooler is new
    tokenizer = text_encoder.load_tokenizer(c.ENCODER)
    places = text_encoder.load(c.ENCODER).config.max_position_embeddings
    if c.max_tokens > places:
        raise UserError(f"max_tokens is {c.max_tokens}; {c.ENCODER} reads {places} at most")
    c.encoder_sha256 = weights_sha256(c.ENCODER)
    if not folders:
        from expert_merging.wemoe import text_docs

        folders = [text_docs.write_once(c)]
    tasks = text_tasks.read_all(folders, c.text_tasks, unseen)
    merged = tuple(name for name in tasks if name not in unseen)
    for task in tasks.values():
        for seed in c.seeds:
            drawn = {row.label for row in task.sample("train", c.train_texts, seed)}
            if lost := sorted(set(range(task.classes)) - drawn):
                raise UserError(
                    f"seed {seed} draws no example of label {lost[0]} of {task.name} in its {c.train_texts} training "
                    "examples; raise train_texts"
                )
    if "generalization" in c.parts and c.general_tasks >= len(merged) + len(unseen):
        raise UserError(
            f"general_tasks is {c.general_tasks} of {len(merged)} tasks: nothing would be left to generalize to; lower it, or "
            "leave generalization out of parts"
        )
    c.overlaps = text_tasks.overlaps(tasks, merged)
    for one in c.overlaps:
        print(f"TASKS_PATH: {one}; models merged with {one.trained} have seen them")
    return tasks, merged, tokenizer


def missing(c: SimpleNamespace, seed: int, tasks: Mapping[str, TextTask], merged: tuple[str, ...]) -> list[Run]:
    """The runs without a record, in their order; this process is now the only one that may make them."""
    ablates = seed in c.seeds[: c.ablation_seeds]
    runs = [run for part in text_plan.PARTS if part in c.parts and (ablates or part not in text_plan.ABLATIONS)
            for run in text_plan.runs_of(part, c.methods, merged, c.general_tasks)]  # fmt: skip
    names = [run.name for run in runs]
    wanted = records.missing(
        Path(c.WEMOE_TEXT_DIR), f"seed{seed}", names, identity_of(c, tasks, merged), "WEMOE_TEXT_DIR"
    )  # fmt: skip
    return [run for run in runs if run.name in wanted]


def note(seed: Seed, run: Run, found: dict[str, Any]) -> None:
    """Write a record."""
    folder, group = Path(seed.c.WEMOE_TEXT_DIR), f"seed{seed.number}"
    found |= {"merging": run.method, "overlaps": seed.c.overlaps}
    records.add(folder, group, run.name, found, seed.number, seed.identity)
