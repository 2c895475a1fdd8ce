"""What neighbours/MEO_finetune.py compares: the tasks as the constants ask for them, and every variant's run on each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.meo import recipes
from expert_merging.meo.recipes import Recipe
from expert_merging.run import results


@dataclass(frozen=True)
class Job:
    """A task: its recipe; the published model it starts from, "" where it has none; and the experts to compare."""

    task: str
    recipe: Recipe
    model: str
    n: int
    ks: tuple[int, ...]
    levels: tuple[str, ...]


def jobs_of(c: SimpleNamespace) -> list[Job]:
    """The tasks that `c.tasks` names, with the recipe's own experts where the constants leave them to it. To be called before
    transformers is imported (`recipes.published_model`). Raises UserError for what cannot be."""
    jobs = []
    for task in dict.fromkeys(c.tasks):
        recipe = recipes.chosen(c, task)
        ks = tuple(dict.fromkeys(k or recipe.k for k in c.ks))
        levels = tuple(dict.fromkeys(recipe.level if level == "own" else level for level in c.levels))
        jobs.append(Job(task, recipe, recipes.published_model(c, recipe), c.n or recipe.n, ks, levels))
    return jobs


def check(c: SimpleNamespace, jobs: Sequence[Job]) -> dict[str, Mapping[str, Sequence[dict]]]:
    """{task: its raw examples}, after a look at all that can be known beforehand. Raises UserError for what cannot be."""
    from expert_merging.meo import finetuning

    for job in jobs:
        finetuning.check(c.family, job.n, job.ks, job.levels)
        if job.model:
            finetuning.check_model(job.model, c.family)
    return {job.task: recipes.load_raw(job.task, c) for job in jobs}


def run_job(c: SimpleNamespace, accelerator, job: Job, base: str, raw: Mapping[str, Sequence[dict]]) -> Path:
    """Train all variants of all seeds on a task from the model `base`; those that have been run are not run again. For a seed
    they have the same rows, batches and head. Returns the folder of the records."""
    from expert_merging.meo import finetuning

    finetuning.check_model(base, c.family)
    tokenizer, recipe = finetuning.load_tokenizer(base), job.recipe
    rows, facts = recipes.rows_of(job.task, recipe, raw, tokenizer)
    sizes = ", ".join(f"{len(part):,} {split}" for split, part in rows.items())
    accelerator.print(
        f"{c.family} on {job.task}: {sizes}; {recipe.lr:g} x {recipe.epochs} epochs of {recipe.batch_size}"
    )
    if any(facts["cut"].values()):
        cut = ", ".join(f"{number:,} {split}" for split, number in facts["cut"].items())
        accelerator.print(f"cut at {recipe.length} tokens: {cut}")

    folder = Path(c.MEO_DIR) / f"{c.family}_{job.task}"
    about = {"recipe": recipes.as_json(recipe), "data": recipes.rows_hash(rows), "base": finetuning.weights_hash(base)}
    about |= results.identity(c, ("family", "precision"), task=job.task, n=job.n)
    for seed in c.seeds:
        for variant in finetuning.variants(c.family, job.n, job.ks, job.levels):
            path = folder / f"seed{seed}" / variant.file
            identity: dict[str, Any] = {**about, "seed": seed, "variant": variant.name}
            if not results.is_done(f"{path}.json", identity, Path(f"{path}.run"), elsewhere="MEO_DIR"):
                finetuning.run_variant(
                    c, accelerator, variant, base, tokenizer, path, identity, job.task, recipe, rows, facts
                )
    return folder
