"""WEMoE and E-WEMoE on CLIP: merge vision towers fine-tuned on several data sets, and compare with the other ways to merge.

Reads   CLIP_PATH, EXPERT_PATH and the data sets, from the hub or from local folders in the same formats.
Writes  WEMOE_CLIP_DIR: records/{group}/{method}.json with the released results' keys and where they come from; routers;
        tables and figures.
Takes   for ViT-B/32, eight tasks and 1000 steps: the authors name 15 to 20 minutes on two RTX 3090 for adapting, to which comes
        testing. Interrupted, it goes on.

What adapts sees the test images without their labels, as in the papers (arXiv 2402.00433, 2410.21804; docs/wemoe.md).
"""

from expert_merging.merging.registry import FROM_WEIGHTS, constants
from expert_merging.run.constants import run

globals().update(constants(FROM_WEIGHTS.values()))  # lam, ties_keep ..: those of the registry
experiment = "multi_task"  # or generalization: unseen_tasks only tested; or robustness: robust_tasks, corrupted
clip_size = "base-patch32"  # base-patch32 | base-patch16 | large-patch14: the published models, and the results' folder
CLIP_PATH = "openai/clip-vit-{clip_size}"  # the pre-trained CLIP with its text tower: hub name or folder
EXPERT_PATH = "tanganke/clip-vit-{clip_size}_*"  # fine-tuned vision towers, * standing for the task
DATASET_PATH = ""  # folders of the data sets, * standing for the task; empty takes the published ones
CLASS_NAMES_PATH = ""  # folder with {task}.json, a list of class names, where neither CLIP's nor the data set's will do
clip_tasks = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
unseen_tasks = ("mnist", "eurosat")  # in the experiment generalization
robust_tasks = ("stanford-cars", "eurosat", "resisc45", "gtsrb")  # in the experiment robustness
# fmt: off
corruptions = (
    "clean", "contrast", "gaussian_noise", "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "spatter",
)  # a split of that name where the data set has one, else made here at severity 2
methods = (
    "pretrained", "individual", "average", "task_arithmetic", "ties_mean", "ties_sum", "adamerging_task", "adamerging_layer",
    "wemoe", "wemoe_batch", "ewemoe", "ewemoe_batch",
)  # or others of those in expert_merging/wemoe/classification.py, to which belongs all that merges weights in the registry
# fmt: on
prune_ratios = (0.9,)  # shares of each task vector that E-WEMoE drops: a model each, and from three on a figure of them
first_layer = 0  # layers before it are merged once and for all: shallow routers hardly tell tasks apart
adapt_lr = 1e-4  # of routers
adamerging_lr = 1e-3  # of coefficients, a router's of depth 0 too
adapt_steps = 1000  # of 16 images a task; as published, 200 come within a point of 1000
adapt_batch_size = 16  # images of a task in a step
images_per_batch = 128  # when testing
statistics_examples = 256  # of a task's test images, without labels: what Fisher and RegMean look at
guard = "warn"  # of collapse while adapting: warn | rollback | off
guard_floor = 0.5  # share of its first value to which the entropy of a task's mean prediction may fall
images_per_task = 0  # test images; 0 takes all
save_models = False  # write merged WEMoE models too, not only their routers
WEMOE_CLIP_DIR = "{RUN_DIR}/wemoe_clip/{clip_size}/{experiment}"
tables_only = False  # make the tables and figures in WEMOE_CLIP_DIR again from its records, and stop

_instead = {  # of global_config.py, which have no say here
    "lr": "adapt_lr and adamerging_lr", "num_epochs": "adapt_steps", "batch_size": "adapt_batch_size",
    "test_examples": "images_per_task", "eval_batch_size": "images_per_batch",
}  # fmt: skip


def main(c):
    from pathlib import Path

    from expert_merging.wemoe import report

    folder = Path(c.WEMOE_CLIP_DIR)
    if c.tables_only:
        print(report.write(folder))
        return

    from expert_merging.core.hub import local_folder, offline_if_unreachable

    if local_folder(c.CLIP_PATH, "CLIP_PATH") is None or not c.DATASET_PATH:
        offline_if_unreachable()

    from expert_merging.run.devices import make_accelerator
    from expert_merging.wemoe import clip_experiment, records
    from expert_merging.wemoe.classification import run_method

    # The models to merge: theta_0 and a fine-tuned vision tower a task. The text tower makes each task's frozen head.
    experiment = clip_experiment.experiment_of(c)
    device = make_accelerator(c).device
    wanted = (experiment.methods, experiment.identity, "WEMOE_CLIP_DIR", experiment.apart)
    missing = {group: records.missing(folder, group, *wanted) for group in experiment.groups}
    pool = clip_experiment.open_pool(c, experiment, device) if any(missing.values()) else None

    for group, methods in missing.items():
        # Test images, as they are or corrupted; what adapts, adapts to the same.
        tasks = clip_experiment.tasks_of(c, experiment, pool, group, device) if methods else []
        seen = [task for task in tasks if task.name not in experiment.unseen]
        for method in methods:
            more = {"checkpoint": folder / f"{group}_{method}.adapting", "identity": experiment.identity}
            found, model = run_method(method, pool.base, pool.experts, tasks, seen, pool.settings, **more)
            found |= clip_experiment.noted(c, experiment, found, model, folder / "models" / f"{group}_{method}")
            records.add(folder, group, method, found, c.seed, experiment.identity)
            print(f"{group}, {method}: {report.line(found)}")
    print(report.write(folder))


if __name__ == "__main__":
    run(main, globals())
