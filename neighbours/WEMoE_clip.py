"""WEMoE and E-WEMoE on CLIP: merge vision towers fine-tuned on several data sets, and compare with the other ways to merge.

Reads   CLIP_PATH, EXPERT_PATH and the data sets, from the hub or from local folders in the same formats.
Writes  WEMOE_CLIP_DIR: records/{group}/{method}.json with the released results' keys and where they come from; routers;
        tables and figures.
Takes   for ViT-B/32, eight tasks and 1000 steps: the authors name 15 to 20 minutes on two RTX 3090 for adapting, to which comes
        testing. Interrupted, it goes on.

What adapts sees the test images without their labels, as in the papers (arXiv 2402.00433, 2410.21804; docs/wemoe.md).
"""

from expert_merging.run.constants import run

experiment = "multi_task"  # or generalization: unseen_tasks only tested; or robustness: robust_tasks, corrupted
CLIP_PATH = "openai/clip-vit-base-patch32"  # the pre-trained CLIP with its text tower: hub name or folder
EXPERT_PATH = "tanganke/clip-vit-base-patch32_*"  # fine-tuned vision towers, * standing for the task
DATASET_PATH = ""  # folders of the data sets, * standing for the task; empty takes the published ones
CLASS_NAMES_PATH = ""  # folder with {task}.json, a list of class names, where the data set's own will not do
clip_tasks = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
unseen_tasks = ("mnist", "eurosat")  # in the experiment generalization
robust_tasks = ("stanford-cars", "eurosat", "resisc45", "gtsrb")  # in the experiment robustness
# fmt: off
corruptions = (
    "clean", "contrast", "gaussian_noise", "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "spatter",
)  # a split of that name where the data set has one, else made here at severity 2
methods = (
    "pretrained", "individual", "average", "task_arithmetic", "ties_mean", "ties_sum", "adamerging_task", "adamerging_layer",
    "wemoe", "wemoe_batch", "ewemoe_90", "ewemoe_90_batch",
)  # see expert_merging/wemoe/classification.py
# fmt: on
lam = 0.3  # coefficient of the task vectors outside the feed-forward layers, and of all at first
first_layer = 0  # layers before it are merged once and for all: shallow routers hardly tell tasks apart
adapt_lr = 1e-4  # of routers
adamerging_lr = 1e-3  # of coefficients
adapt_steps = 1000  # of 16 images a task; as published, 200 come within a point of 1000
adapt_batch_size = 16  # images of a task in a step
images_per_batch = 128  # when testing
guard = "warn"  # of collapse while adapting: warn | rollback | off
guard_floor = 0.5  # share of its first value to which the entropy of a task's mean prediction may fall
images_per_task = 0  # test images; 0 takes all
save_models = False  # write merged WEMoE models too, not only their routers
WEMOE_CLIP_DIR = "{RUN_DIR}/wemoe_clip/{experiment}"
tables_only = False  # make the tables and figures in WEMOE_CLIP_DIR again from its records, and stop


def main(c):
    from pathlib import Path

    from expert_merging.core.errors import UserError

    if c.experiment not in ("multi_task", "generalization", "robustness"):
        raise UserError(f"there is no experiment {c.experiment!r}; there are multi_task, generalization, robustness")
    folder = Path(c.WEMOE_CLIP_DIR)
    if c.tables_only:
        from expert_merging.wemoe import report

        print(report.write(folder))
        return

    from expert_merging.core.hub import local_folder, offline_if_unreachable

    if local_folder(c.CLIP_PATH, "CLIP_PATH") is None or not c.DATASET_PATH:
        offline_if_unreachable()

    from expert_merging.run.devices import make_accelerator
    from expert_merging.wemoe import checkpoints, clip, report
    from expert_merging.wemoe.classification import Settings, check_method, run_method
    from expert_merging.wemoe.corruptions import CORRUPTIONS, corrupting

    for method in c.methods:
        check_method(method)
    tasks = c.robust_tasks if c.experiment == "robustness" else c.clip_tasks
    unseen = c.unseen_tasks if c.experiment == "generalization" else ()
    groups = c.corruptions if c.experiment == "robustness" else (f"seed{c.seed}",)
    if wrong := [g for g in groups if c.experiment == "robustness" and g != "clean" and g not in CORRUPTIONS]:
        raise UserError(f"there is no corruption {wrong[0]!r}; there are: clean, {', '.join(CORRUPTIONS)}")

    # The models to merge: theta_0 and a fine-tuned vision tower a task. The text tower makes each task's frozen head.
    device = make_accelerator(c).device
    base, text, tokenizer, processor = clip.load_clip(c.CLIP_PATH, "CLIP_PATH")
    state = base.state_dict()
    experts = {t: clip.Expert(c.EXPERT_PATH.replace("*", t), "EXPERT_PATH", state) for t in tasks if t not in unseen}
    images = {
        t: clip.Images(*clip.data_of(t, c.DATASET_PATH), "test", "DATASET_PATH", c.images_per_task) for t in tasks
    }
    heads = clip.heads_of(text.to(device), tokenizer, images, c.CLASS_NAMES_PATH)
    settings = Settings(
        lam=c.lam, lr=c.adapt_lr, adamerging_lr=c.adamerging_lr, steps=c.adapt_steps, guard=c.guard,
        guard_floor=c.guard_floor, seed=c.seed, adapt_batch_size=c.adapt_batch_size, eval_batch_size=c.images_per_batch,
        logit_scale=text.logit_scale.exp().item(),
        layers=range(c.first_layer, base.config.num_hidden_layers) if c.first_layer else None,
    )  # fmt: skip
    names = (
        "CLIP_",
        "EXPERT_",
        "DATASET_",
        "CLASS_",
        "clip_",
        "unseen",
        "robust",
        "lam",
        "first",
        "adapt",
        "adamerging",
    )
    identity = report.identity(c, (*names, "guard", "images", "seed", "experiment"))

    for group in groups:
        # Test images, as they are or corrupted; what adapts, adapts to the same.
        own = [clip.test_task(t, images[t], heads[t], processor, c, group, corrupting).to(device) for t in tasks]
        adapt_tasks = [task for task in own if task.name not in unseen]
        for method in report.missing(folder, group, c.methods, identity):
            found, model = run_method(
                method, base, experts, own, adapt_tasks, settings, checkpoint=folder / f"{group}_{method}.adapting"
            )
            if unseen:
                found |= report.seen_and_unseen(found, tasks, unseen)
            if hasattr(model, "wemoe"):
                place = folder / "models" / f"{group}_{method}"
                checkpoints.save_routers(model, place.with_suffix(".routers.safetensors"))
                found["files"] = checkpoints.save(model, place) if c.save_models else {}
            report.add(folder, group, method, found, c.seed, identity)
            print(f"{group}, {method}: {report.line(found)}")
    print(report.write(folder))


if __name__ == "__main__":
    run(main, globals())
