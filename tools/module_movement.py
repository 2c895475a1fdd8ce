"""Which modules fine-tuning moves: L2 distance and cosine of each kind of module by layer, base against fine-tuned.

Reads   base_model, and each of tuned_models: folders or names on the hub with model.safetensors: vision towers of CLIP, BERTs
        with or without a head, T5, GPT-2. What only one of two models has (a head, say) is left out and said.
Writes  MOVEMENT_DIR: movement.json, a table (.md, .csv, .tex) and movement.png.
Takes   a few seconds a model of 100M parameters on one CPU core.
"""

from expert_merging.run.constants import run

base_model = "openai/clip-vit-base-patch32"  # the pre-trained model
tuned_models = tuple(
    f"tanganke/clip-vit-base-patch32_{task}"
    for task in ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
)  # fine-tuned from it
MOVEMENT_DIR = "{RUN_DIR}/movement"


def main(c):
    from pathlib import Path

    from expert_merging.core.hub import local_folder, offline_if_unreachable

    named = {"base_model": (c.base_model,), "tuned_models": c.tuned_models}
    if any(local_folder(path, constant) is None for constant, paths in named.items() for path in paths):
        offline_if_unreachable()

    from expert_merging.analysis.movement import movement
    from expert_merging.core.hub import weights_folder
    from expert_merging.core.safetensors_folder import SafetensorsFolder
    from expert_merging.report import movement as report
    from expert_merging.report.tables import save
    from expert_merging.run import results

    base = SafetensorsFolder(weights_folder(c.base_model, "base_model"))
    tuned = {path: SafetensorsFolder(weights_folder(path, "tuned_models")) for path in c.tuned_models}
    weights = {path: one.sha256() for path, one in {c.base_model: base, **tuned}.items()}
    path = Path(c.MOVEMENT_DIR) / "movement.json"
    identity = results.identity(c, ("base_model", "tuned_models"), weights=weights)
    if results.is_done(path, identity, elsewhere="MOVEMENT_DIR"):
        return

    found = {}
    for name, tensors in tuned.items():
        moved, left = movement(base, tensors)
        found[name] = report.rows_of(moved)
        if left:
            print(f"{name}: left out {len(left)} tensors that the base model has not in this shape, such as {left[0]}")
    table = report.table(found)
    save([table], path.parent)
    report.draw(found, path.with_suffix(".png"))
    results.save(path, identity, {"models": found})
    print(table.markdown())


if __name__ == "__main__":
    run(main, globals())
