"""6b  A CAEM model without experts: those of each layer merged into one for a task, saved as a plain T5, and compared.

Reads   MODEL_SAVE_PATH/{source} (CAEM_multi_task_finetune.py, or any finished run) and DATA_DIR/{densify}.
Writes  MODEL_SAVE_PATH/{source}_{densify}: a T5ForConditionalGeneration that stock transformers loads and that serves the
        task without experts; PICKLE_PATH/densify/{source}_{densify}.json: how near it is to the Switch, layer by layer and
        in what it writes, for several k, with and without alignment, beside controls; sizes and latencies of both.
Takes   at tiny 4 minutes on one CPU core, without `compare` seconds. Interrupted, it goes on.
"""

from expert_merging.core.scales import by_scale
from expert_merging.run.constants import run

densify = "doc_topic"  # the task that the dense model is for
source = "CAEM_[8|8]"  # a finished run in MODEL_SAVE_PATH
k = 4  # experts merged in each layer: those the task uses most
gate = "probability"  # what weights them: probability (mean of the router's) | usage (share of tokens) | uniform
aligned = True  # order the hidden units of each expert like those of the task's most used one, before averaging
refitted = True  # then fit the second matrix to what the sparse layer makes of the task's text
ridge = 0.1  # how strongly the fit holds on to what was merged
calibration_examples = by_scale(paper=2000, night=1000, tiny=256)  # of training: for the gates and the fit
compare = True  # measure fidelity, for all of `ks`
ks = (1, 2, 4, 8)  # experts merged
compare_examples = by_scale(paper=1000, night=240, tiny=120)  # of test
latency_batches = (1, 32)  # examples decoded together
latency_runs = 5  # the median of so many is taken


def main(c):
    from pathlib import Path

    from expert_merging.switch.models import preflight

    preflight(c, [c.densify])

    from expert_merging.core.hub import load_tokenizer
    from expert_merging.core.safetensors_folder import SafetensorsFolder
    from expert_merging.data import features
    from expert_merging.meo import densification
    from expert_merging.run import results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.switch import models
    from expert_merging.training import finetuning

    folder, accelerator = densification.open_source(c), make_accelerator(c)
    dense_folder, hashes = Path(f"{folder}_{c.densify}"), finetuning.data_hashes(c, [c.densify])
    tokenizer = load_tokenizer(str(folder), "MODEL_SAVE_PATH")
    data = features.load(c.densify, c, tokenizer)
    path, work = (Path(c.PICKLE_PATH) / "densify" / f"{dense_folder.name}{end}" for end in (".json", ".run.json"))
    identity = results.identity(c, weights=SafetensorsFolder(folder).sha256(), data=hashes)
    if results.is_done(path, identity, work, again="merge"):
        return

    # Merge for the task, by how it uses the experts, and fit the second matrices to its text.
    model = models.load_model(folder, "MODEL_SAVE_PATH").to(accelerator.device).eval()
    densifier = densification.Densifier(c, model, data["train"], tokenizer)
    dense = densifier.dense(c.k, aligned=c.aligned, refitted=c.refitted)
    models.save_model(dense, tokenizer, dense_folder)
    print(f"wrote {dense_folder}: {dense.num_parameters():,} parameters; the Switch has {model.num_parameters():,}")
    if not c.compare:
        return

    # Compare with the Switch: the same layer inputs, the same targets, and what both write.
    both = {"Switch": (model, folder), "dense": (dense, dense_folder)}
    record = densification.compare(c, accelerator, densifier, both, data["test"], tokenizer, work, identity)
    results.save(path, identity, record)
    work.unlink()
    print("\n".join(densification.lines(record)))


if __name__ == "__main__":
    run(main, globals())
