"""6a  A dense model against the same with several experts, as a vanilla MoE and as MEO: score, FLOPs, time, memory.

Reads   MODEL_PATH, or for the docstring tasks a small model that is pre-trained here first; the task's data from the hub,
        from GLUE_PATH, WIKITEXT_PATH, SQUAD_PATH, XSUM_PATH, or from the docstrings of the installed packages.
Writes  MEO_DIR/{family}_{task}/seed{seed}/{variant}.json, a record a run, and from these the table and the figures in
        MEO_DIR/{family}_{task}/report. MEO_DIR/bases/{family}, the small pre-trained model.
Takes   at tiny about half a minute a run on one CPU core, and pre-training three minutes. Interrupted, it goes on; what
        has been run is not run again.
"""

from expert_merging.core.scales import by_scale
from expert_merging.run.constants import run

family = "bert"  # bert | gpt2 | t5 | bart
task = by_scale(  # GLUE's cola .. wnli, wikitext, squad, xsum; or doc_topic, doc_lm, doc_qa, doc_summary
    paper="sst2", night="doc_topic", tiny="doc_topic"
)
n = 8  # experts in place of each FFN linear (MEO's scripts: 16 for GLUE, else 8)
ks = (1, 2, 4)  # of them active
levels = ("sequence", "token")  # task | sequence | token: what shares a gate; for gpt2 task, token
seeds = (0, 1, 2)
MODEL_PATH = ""  # hub name or folder; nothing takes the task's own (expert_merging/meo/recipes.py)
GLUE_PATH = "nyu-mll/glue"  # hub name, or a folder with a folder a task: train and validation as .jsonl, .csv, .parquet
WIKITEXT_PATH = "Salesforce/wikitext"  # hub name, or a folder with wikitext-2-raw-v1/: train, validation, test
MEO_DIR = "{RUN_DIR}/meo"
learning_rate = 0.0  # at the start; 0 takes the task's own, as for the next three
epochs = 0  # the best on validation is kept
train_batch = 0  # sequences a step
input_length = 0  # tokens; longer inputs are cut

# the small models of the docstring tasks, and their pre-training
d_model = by_scale(paper=128, night=256, tiny=64)
d_ff = by_scale(paper=512, night=1024, tiny=256)
num_layers = by_scale(paper=2, night=4, tiny=2)  # in a stack
num_heads = by_scale(paper=4, night=8, tiny=4)
pretraining_steps = by_scale(paper=1500, night=20000, tiny=1500)
pretraining_batch = by_scale(paper=32, night=128, tiny=32)  # blocks a step
pretraining_length = 64  # tokens a block
pretraining_lr = 3e-3  # peak


def main(c):
    from pathlib import Path

    from expert_merging.meo import recipes

    recipe = recipes.chosen(c)
    published = recipes.published_model(c, recipe)

    from transformers.utils import logging

    from expert_merging.meo import bases, finetuning, report
    from expert_merging.run import results
    from expert_merging.run.devices import make_accelerator

    logging.set_verbosity_error()  # it would say of every model that its head is new
    finetuning.check(c.family, c.n, c.ks, c.levels)
    accelerator = make_accelerator(c)

    # A small model, pre-trained on docstrings, where the task has no published one.
    base = published or bases.pretrain_once(c, accelerator, Path(c.MEO_DIR) / "bases" / c.family)
    finetuning.check_model(base, c.family)
    tokenizer = finetuning.load_tokenizer(base)

    # The same rows, batches and head for all variants of a seed.
    rows, facts = recipes.rows_of(c.task, recipe, recipes.load_raw(c.task, c), tokenizer)
    sizes = ", ".join(f"{len(part):,} {split}" for split, part in rows.items())
    accelerator.print(f"{c.family} on {c.task}: {sizes}; {recipe.lr:g} x {recipe.epochs} epochs of {recipe.batch_size}")
    folder, labels = Path(c.MEO_DIR) / f"{c.family}_{c.task}", facts.get("labels")
    about = {"recipe": recipes.as_json(recipe), "data": recipes.rows_hash(rows), "base": finetuning.weights_hash(base)}
    about |= results.identity(c, ("family", "task", "n", "precision"))
    for seed in c.seeds:
        for variant in finetuning.variants(c.family, c.n, c.ks, c.levels):
            path, identity = folder / f"seed{seed}" / variant.file, {**about, "seed": seed, "variant": variant.name}
            if not results.is_done(f"{path}.json", identity, Path(f"{path}.run"), elsewhere="MEO_DIR"):
                finetuning.run_variant(c, accelerator, variant, base, tokenizer, path, identity, recipe, rows, labels)

    if accelerator.is_main_process:
        print(report.write_finetuning(report.records_of(folder), folder / "report"))


if __name__ == "__main__":
    run(main, globals())
