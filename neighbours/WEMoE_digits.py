"""WEMoE and E-WEMoE against merging once and for all, on digits: offline, minutes on a CPU, by the code that merges CLIP.

Reads   nothing: the images are scikit-learn's.
Writes  WEMOE_DIR: records/seed{n}/{method}.json, tables (.md, .csv, .tex) and figures made of them.
Takes   some 5 minutes a seed on one core. Interrupted, it goes on with the method it was at.

Four tasks share the images: as they are, rotated, mirrored as a negative, with permuted pixels. A small CLIP is pre-trained
on all, fine-tuned on each, and the four are merged; what adapts sees the test images without labels (docs/wemoe.md).
"""

from expert_merging.merging.registry import FROM_WEIGHTS, constants
from expert_merging.run.constants import run

globals().update(constants(FROM_WEIGHTS.values()))  # lam, ties_keep ..: those of the registry
seeds = (0, 1, 2)
# fmt: off
methods = (
    "pretrained", "individual", "average", "task_arithmetic", "ties_mean", "ties_sum", "adamerging_task", "adamerging_layer",
    "wemoe", "wemoe_depth0", "wemoe_batch", "ewemoe",
)  # or others of those in expert_merging/wemoe/classification.py, to which belongs all that merges weights in the registry
# fmt: on
prune_ratios = (
    0.0,
    0.9,
    1.0,
)  # shares of each task vector that E-WEMoE drops: a model each, and from three on a figure
pretrain_examples = 500  # of the 1200 training images; few, or there is nothing left for fine-tuning to add
pretrain_steps = 400  # of 64 images; the tasks in turn
finetune_steps = 300  # of 64 images, for each task
training_lr = 1e-3
adapt_lr = 1e-3  # of routers; 1e-4 at CLIP's size
adamerging_lr = 1e-3  # of coefficients, a router's of depth 0 too
adapt_steps = 200
adapt_batch_size = 16  # images of a task in a step
statistics_examples = 256  # of a task's test images, without labels: what Fisher and RegMean look at
guard = "warn"  # of collapse while adapting: warn | rollback | off
guard_floor = 0.5  # share of its first value to which the entropy of a task's mean prediction may fall
images_per_task = 0  # test images; 0 takes all 597
WEMOE_DIR = "{RUN_DIR}/wemoe_digits"
tables_only = False  # make the tables and figures in WEMOE_DIR again from its records, and stop

_instead = {"seed": "seeds", "lr": "training_lr"}  # of global_config.py, which have no say here


def main(c):
    from pathlib import Path

    from expert_merging.wemoe import report

    folder = Path(c.WEMOE_DIR)
    if c.tables_only:
        print(report.write(folder))
        return

    from expert_merging.run import results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.wemoe import digits, records
    from expert_merging.wemoe.classification import Settings, changed, expanded, run_method

    digits.check_constants(c)
    methods = expanded(c.methods, c.prune_ratios)
    device = make_accelerator(c).device
    identity = results.identity(c, (*digits.DEPENDS_ON, *changed(c)))
    for seed in c.seeds:
        missing = records.missing(folder, f"seed{seed}", methods, identity, "WEMOE_DIR")
        if not missing:
            continue

        # A model that can all four tasks a little, and from it one for each task.
        pool = (c.pretrain_examples, c.pretrain_steps, c.finetune_steps, c.training_lr, folder / "pools")
        base, experts = digits.pool(seed, *pool)
        tasks = [task.to(device) for task in digits.test_tasks(seed, c.images_per_task)]
        settings = Settings.of(c, seed=seed, logit_scale=digits.LOGIT_SCALE)

        # Each method merges the same models, adapts if it does, and is measured on the same images.
        for method in missing:
            more = {"checkpoint": folder / f"seed{seed}_{method}.adapting", "identity": identity}
            found, _ = run_method(method, base, experts, tasks, tasks, settings, **more)
            records.add(folder, f"seed{seed}", method, found, seed, identity)
            print(f"seed {seed}, {method}: {report.line(found)}")
    print(report.write(folder))


if __name__ == "__main__":
    run(main, globals())
