"""What neighbours/MEO_finetune.py compares: the tasks as the constants ask for them, and every variant's run on each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from expert_merging.core.errors import UserError, at_least
from expert_merging.meo import recipes
from expert_merging.meo.recipes import Recipe
from expert_merging.meo.run_records import is_of_several, records_of, run_file
from expert_merging.report.records import Groups
from expert_merging.run import results

if TYPE_CHECKING:  # torch and transformers come with it
    from expert_merging.meo.finetuning import Variant


@dataclass(frozen=True)
class Job:
    """A task: its recipe at each learning rate; the published model it starts from, "" where it has none; and the experts
    to compare."""

    task: str
    recipes: list[Recipe]
    model: str
    n: int
    ks: tuple[int, ...]
    levels: tuple[str, ...]


def jobs_of(c: SimpleNamespace) -> list[Job]:
    """The tasks that `c.tasks` names, with the recipe's own experts where the constants leave them to it. To be called before
    transformers is imported (`recipes.published_model`). Raises UserError for what cannot be."""
    if c.scale == "real" and not c.TASKS_PATH and (homeless := [t for t in c.tasks if not t.startswith("doc_")]):
        raise UserError(
            f"TASKS_PATH is empty; give the folder that holds the folder {homeless[0]} with train.jsonl, validation.jsonl, "
            "test.jsonl (docs/meo.md), or --tasks doc_topic, which needs none"
        )
    jobs = []
    for task in dict.fromkeys(c.tasks):
        own = recipes.chosen(c, task)
        ks = tuple(dict.fromkeys(k or own[0].k for k in c.ks))
        levels = tuple(dict.fromkeys(own[0].level if level == "own" else level for level in c.levels))
        jobs.append(Job(task, own, recipes.published_model(c, own[0]), c.n or own[0].n, ks, levels))
    return jobs


def check(c: SimpleNamespace, jobs: Sequence[Job]) -> dict[str, Mapping[str, Sequence[dict]]]:
    """{task: its raw examples}, after a look at all that can be known beforehand. Raises UserError for what cannot be."""
    from expert_merging.meo import finetuning

    at_least(c, 0, "task_train", "task_validation", "task_test")
    if any(not job.model for job in jobs):  # a small model is pre-trained first
        at_least(c, 1, "d_model", "d_ff", "num_layers", "num_heads", "pretraining_steps", "pretraining_batch")
        at_least(c, 8, "pretraining_length")
        if c.d_model % c.num_heads or not c.pretraining_lr > 0:
            raise UserError("d_model must be a multiple of num_heads, and pretraining_lr above 0")
    for job in jobs:
        finetuning.check(c.family, job.n, job.ks, job.levels)
        if job.model:
            finetuning.check_model(job.model, c.family, job.recipes[0].length)
            finetuning.load_tokenizer(job.model)
    return {job.task: recipes.load_raw(job.task, c) for job in jobs}


def run_job(c: SimpleNamespace, accelerator, job: Job, base: str, raw: Mapping[str, Sequence[dict]]) -> Groups:
    """Train all variants of all seeds on a task from the model `base`; those that have been run are not run again. For a seed
    they have the same rows, batches and head. Returns the records of these learning rates, also of other seeds."""
    from expert_merging.meo import finetuning

    tokenizer, first = finetuning.load_tokenizer(base), job.recipes[0]
    finetuning.check_model(base, c.family, first.length)
    rows, facts = recipes.rows_of(job.task, first, raw, tokenizer)
    number = c.task_train if recipes.in_folder(c, job.task) else 0
    sizes = ", ".join(f"{len(part):,} {split}" for split, part in rows.items())
    rates = " and ".join(f"{recipe.lr:g}" for recipe in job.recipes)
    accelerator.print(
        f"{c.family} on {job.task}: {sizes}{f', of training {number:,} a seed' if number else ''}; "
        f"{rates} x {first.epochs} epochs of {first.batch_size}"
    )
    if any(facts["cut"].values()):
        cut = ", ".join(f"{number:,} {split}" for split, number in facts["cut"].items())
        accelerator.print(f"cut at {first.length} tokens: {cut}")

    folder = Path(c.MEO_DIR) / f"{c.family}_{job.task}"
    about: dict[str, Any] = {"data": recipes.rows_hash(rows), "base": finetuning.weights_hash(base)}
    about |= {"drawn": number} if number else {}
    about |= results.identity(c, ("family", "precision"), task=job.task, n=job.n)
    alike = {**about, "recipe": recipes.as_json(first)}
    learning_rates = [recipe.lr for recipe in job.recipes]
    apart = ("seed", "variant", *(["recipe.lr"] if len(learning_rates) > 1 else []))
    beside = [path for path in folder.glob("seed*/*.json") if is_of_several(path.stem) == (len(learning_rates) > 1)]
    results.refuse_others(beside, alike, elsewhere="MEO_DIR", but=apart)
    for seed in c.seeds:
        of_seed = {**rows, "train": recipes.drawn(rows["train"], number, seed)}
        for variant, recipe in _runs(job, c.family):
            path = folder / f"seed{seed}" / run_file(variant.file, learning_rates, recipe.lr)
            identity: dict[str, Any] = {
                **about,
                "recipe": recipes.as_json(recipe),
                "seed": seed,
                "variant": variant.name,
            }
            if not results.is_done(f"{path}.json", identity, Path(f"{path}.run"), elsewhere="MEO_DIR"):
                finetuning.run_variant(
                    c, accelerator, variant, base, tokenizer, path, identity, job.task, recipe, of_seed, facts
                )
    return records_of(folder, learning_rates)


def _runs(job: Job, family: str) -> "Iterator[tuple[Variant, Recipe]]":
    """What is trained for a seed."""
    from expert_merging.meo import finetuning

    for variant in finetuning.variants(family, job.n, job.ks, job.levels):
        for recipe in job.recipes:
            yield variant, recipe
