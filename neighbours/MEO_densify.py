"""6b  A CAEM model without experts: those of each layer merged into one for a task, saved as a plain T5, and compared.

Reads   MODEL_SAVE_PATH/{source} (CAEM_multi_task_finetune.py, or any finished run) and DATA_DIR/{densify}.
Writes  MODEL_SAVE_PATH/{source}_{densify}: a T5ForConditionalGeneration that stock transformers loads and that serves the
        task without experts; PICKLE_PATH/densify/{source}_{densify}.json: how near it is to the Switch, layer by layer and
        in what it writes, for several k, with and without alignment, beside controls; sizes and latencies of both.
Takes   at tiny 4 minutes on one CPU core, without `compare` seconds. Interrupted, it goes on.
"""

from expert_merging.run.constants import by_scale, run

densify = "doc_topic"  # the task that the dense model is for
source = "CAEM_[8|8]"  # a finished run in MODEL_SAVE_PATH
k = 4  # experts merged in each layer: those the task uses most
gate = "probability"  # what weights them: probability (mean of the router's) | usage (share of tokens) | uniform
aligned = True  # order the hidden units of each expert like those of the task's most used one, before averaging
refitted = True  # then fit the second matrix to what the sparse layer makes of the task's text
ridge = 0.1  # how strongly the fit holds on to what was merged
calibration_examples = by_scale(paper=2000, small=1000, tiny=256)  # of training: for the gates and the fit
compare = True  # measure fidelity, for all of `ks`
ks = (1, 2, 4, 8)  # experts merged
compare_examples = by_scale(paper=1000, small=240, tiny=120)  # of test
latency_batches = (1, 32)  # examples decoded together
latency_runs = 5  # the median of so many is taken


def check_constants(c, experts):
    """Raises UserError for a number of experts that the model does not have, an unknown gate, and too few examples."""
    from expert_merging.core.errors import UserError

    for name, value in (("k", c.k), *(("ks", value) for value in c.ks)):
        if not 1 <= value <= experts:
            raise UserError(f"{name} is {value}; {c.source} has {experts} experts a layer: give 1 to {experts}")
    if c.gate not in ("probability", "usage", "uniform"):
        raise UserError(f"gate is {c.gate!r}; it must be probability, usage or uniform")
    for name in ("calibration_examples", "compare_examples", "latency_runs", *(["latency_batches"] * bool(c.compare))):
        value = getattr(c, name)
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise UserError(f"{name} is {value}; it must be 1 or more")
    if c.ridge <= 0:
        raise UserError(f"ridge is {c.ridge}; it must be above 0")


def variants(c, experts):
    """What is compared: {name: settings}. `decoded`: whether test examples are written out as well."""
    made = {"no layer": {"k": 0, "decoded": True}, "random, refitted": {"k": -1, "refitted": True, "decoded": True}}
    for k in c.ks:
        for aligned in (False, True)[: 1 + (k > 1)]:
            for refitted in (False, True):
                name = f"A k={k}{', aligned' * aligned}{', refitted' * refitted}"
                decoded = k == 1 and not refitted or k == max(1, experts // 2) and (aligned or not refitted)
                made[name] = {"k": k, "aligned": aligned, "refitted": refitted, "decoded": decoded}
            ways = {"k": k, "aligned": aligned}
            made[f"A k={k}{', aligned' * aligned}, router kept"] = {**ways, "way": "token"}
            decoded = k in (1, max(1, experts // 2))
            made[f"{'B' if k > 1 else 'C'} k={k}{', aligned' * aligned}"] = {
                **ways,
                "way": "sequence",
                "decoded": decoded,
            }
    middle = max(1, experts // 2)
    made[f"A k={middle}, aligned, by usage"] = {"k": middle, "aligned": True, "gate": "usage"}
    made[f"A k={experts}, aligned, uniform"] = {"k": experts, "aligned": True, "gate": "uniform"}
    return made


def main(c):
    from pathlib import Path

    from expert_merging.core.errors import UserError
    from expert_merging.data.tasks import get_task
    from expert_merging.switch.models import require_patch

    task = get_task(c.densify)
    require_patch()
    folder = Path(c.MODEL_SAVE_PATH) / c.source
    if not folder.is_dir():
        raise UserError(
            f"MODEL_SAVE_PATH: there is no folder {folder}; run CAEM_multi_task_finetune.py, or give --source"
        )

    import contextlib
    import json

    import torch
    from tqdm.auto import tqdm

    from expert_merging.core.files import read_json, write_json
    from expert_merging.core.hub import load_tokenizer
    from expert_merging.core.safetensors_folder import SafetensorsFolder
    from expert_merging.data import features
    from expert_merging.meo import fidelity, switch
    from expert_merging.run import provenance, results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.switch import models
    from expert_merging.switch.cross_entropy import teacher_forced
    from expert_merging.training import finetuning

    experts = json.loads((folder / "config.json").read_text()).get("num_experts", 0)
    check_constants(c, experts)
    accelerator = make_accelerator(c)
    tokenizer = load_tokenizer(str(folder), "MODEL_SAVE_PATH")
    data = features.load(c.densify, c, tokenizer)
    name, dense_folder = f"{c.source}_{c.densify}", Path(f"{folder}_{c.densify}")
    records = Path(c.PICKLE_PATH) / "densify"
    hashes = finetuning.data_hashes(c, [c.densify])
    identity = results.identity(c, weights=SafetensorsFolder(folder).sha256(), data=hashes)
    work = records / f"{name}.run.json"
    if results.finished(records, name, identity, work):
        print(f"{records / name}.json is there already; remove it to merge again")
        return

    # Merge for the task, by how it uses the experts, and fit the second matrices to its text.
    model = models.load_model(folder, "MODEL_SAVE_PATH").to(accelerator.device).eval()
    calibration = data["train"].select(range(min(c.calibration_examples, len(data["train"]))))
    batches = list(teacher_forced(calibration, tokenizer, c))
    uses = switch.measure_use(model, batches)

    def densified(k, gate=c.gate, aligned=False, refitted=False):
        """A T5: k experts merged; 0 leaves the layers out, -1 has hidden units drawn at random."""
        weights = switch.dense_weights(model, uses, max(k, 1), gate, aligned)
        if k <= 0:
            weights = {layer: (wi.clone(), torch.zeros_like(wo)) for layer, (wi, wo) in weights.items()}
        if k < 0:
            generator = torch.Generator().manual_seed(c.seed)
            for wi, _ in weights.values():
                wi.copy_(torch.randn(wi.shape, generator=generator) * wi.std().item())
        return switch.as_t5(model, switch.refit(model, weights, batches, c.ridge) if refitted else weights)

    dense = densified(c.k, aligned=c.aligned, refitted=c.refitted)
    models.save_model(dense, tokenizer, dense_folder)
    print(f"wrote {dense_folder}: {dense.num_parameters():,} parameters; the Switch has {model.num_parameters():,}")
    if not c.compare:
        return

    # Compare with the Switch: the same layer inputs, the same targets, and what both write.
    test = data["test"].select(range(min(c.compare_examples, len(data["test"]))))
    kept = read_json(work) if work.exists() else {}
    found = kept["found"] if kept.get("identity") == identity else {}
    reference = fidelity.Reference(model, test, tokenizer, c)
    if "Switch" not in found:
        scores, texts = fidelity.written(model, test, task, tokenizer, c, accelerator)
        found["Switch"] = {"loss": reference.loss, "scores": scores, "texts": texts}
        found["sizes"] = fidelity.sizes({"Switch": (model, folder), "dense": (dense, dense_folder)})
        write_json(work, {"identity": identity, "found": found})
    if "latency" not in found:
        found["latency"] = fidelity.latency({"Switch": model, "dense": dense}, test, tokenizer, c)
        write_json(work, {"identity": identity, "found": found})
    favourites = {layer: use.favourite for layer, use in uses.items()}
    wanted = variants(c, experts)
    for label in (bar := tqdm(wanted, desc=name, unit="variant", dynamic_ncols=True)):
        if label in found:
            continue
        settings = dict(wanted[label])
        way, decoded = settings.pop("way", "dense"), settings.pop("decoded", False)
        candidate, context = model, contextlib.nullcontext()
        if way == "dense":
            candidate = densified(**settings)
        else:
            gates = {layer: use.gates(c.gate, settings["k"]) for layer, use in uses.items()} if way == "token" else None
            context = switch.merged_experts(model, settings["k"], gates, favourites if settings["aligned"] else None)
        with context:
            result = reference.compare(candidate)
            if decoded:
                result["scores"], texts = fidelity.written(candidate, test, task, tokenizer, c, accelerator)
                same = sum(mine == theirs for mine, theirs in zip(texts, found["Switch"]["texts"], strict=True))
                result["same_text"] = same / len(texts)
        found[label] = {**wanted[label], **result}
        bar.set_postfix_str(f"{label}: agreement {result['agreement']:.3f}", refresh=False)
        write_json(work, {"identity": identity, "found": found})

    about = {"name": name, "task": c.densify, "seed": c.seed, "main_score": task.main_score, "experts": experts}
    about |= {"command": provenance.command(), "versions": provenance.versions(), "identity": identity}
    about |= {"device": accelerator.device.type, "threads": torch.get_num_threads(), "examples": len(test)}
    about["latency_clock"] = "wall" if accelerator.device.type == "cuda" else "process"
    about["uses"] = {
        layer: {"probability": use.probability.tolist(), "usage": use.usage.tolist(), "scale": use.scale}
        for layer, use in uses.items()
    }
    record = about | {key: found.pop(key) for key in ("Switch", "sizes", "latency")} | {"variants": found}
    write_json(records / f"{name}.json", record)
    work.unlink()
    for label, result in {"Switch": record["Switch"], **found}.items():
        if "scores" in result:
            score = f"{task.main_score} {result['scores'][task.main_score]:.2f}"
            print(f"{label}: {score}, loss {result['loss']:.3f}, same text {result.get('same_text', 1):.2f}")


if __name__ == "__main__":
    run(main, globals())
