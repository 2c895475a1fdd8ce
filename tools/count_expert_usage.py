"""Expert usage of a single-task model, counted again: both ways, and with the inputs cut to several lengths.

Reads   DATA_DIR/{task_type} and SOURCE_MODEL_WEIGHT_PATH/single_task_{task_type} (single_task_finetune.py).
Writes  SOURCE_PICKLE_PATH/expert_usage_{task_type}.json: for each length and way of counting the tokens that every expert
        got on validation, and the normalised entropies. CAEM's reading `paper+counts` takes its usage from here.
Takes   at tiny about a minute on 2 CPU cores.
"""

from expert_merging.run.constants import by_scale, run

task_type = "squad"  # ag_news | squad | xsum | doc_topic | doc_qa | doc_summary
num_expert = 8  # experts in each sparse layer
input_lengths = by_scale(paper=(50, 100, 200, 400), small=(16, 32, 64, 128, 256), tiny=(16, 32, 64, 128))  # and uncut


def main(c):
    from pathlib import Path
    from types import SimpleNamespace

    from expert_merging.data.tasks import get_task
    from expert_merging.switch.models import require_patch

    task = get_task(c.task_type)
    require_patch()

    from expert_merging.core.files import write_json
    from expert_merging.core.hub import load_tokenizer
    from expert_merging.core.safetensors_folder import SafetensorsFolder
    from expert_merging.data import features
    from expert_merging.run import provenance, results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.switch import decoding, models, usage
    from expert_merging.training import finetuning, overall

    accelerator = make_accelerator(c)
    model_folder = Path(c.SOURCE_MODEL_WEIGHT_PATH.format(experts=c.num_expert)) / f"single_task_{c.task_type}"
    folder = Path(c.SOURCE_PICKLE_PATH.format(experts=c.num_expert))
    overall.single_task_history(str(folder), c.task_type, c.num_expert, c)
    digests = SafetensorsFolder(model_folder).sha256()
    tokenizer = load_tokenizer(str(model_folder), "SOURCE_MODEL_WEIGHT_PATH")
    data = features.load(c.task_type, c, tokenizer)["validation"]
    identity = results.identity(c, weights=digests, data=finetuning.data_hashes(c, [c.task_type]))
    name = f"expert_usage_{c.task_type}"
    if results.finished(folder, name, identity):
        accelerator.print(f"{folder / name}.json is there already; remove it to count again")
        return
    model = models.load_model(model_folder, "SOURCE_MODEL_WEIGHT_PATH").to(accelerator.device)

    rows = []
    for length in [*(n for n in c.input_lengths if n < c.max_input_length), c.max_input_length]:
        # The first tokens and the end token, as if the limit had been lower.
        ids = [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in data["input_ids"]]
        cut = data.remove_columns("input_ids").add_column("input_ids", ids)
        for counting in ("paper", "released"):
            reading = SimpleNamespace(**vars(c) | {"reading": "paper+counts" if counting == "released" else "paper"})
            model.set_usage_counting(counting)
            model.reset_expert_usage()
            label = f"{c.task_type}, {length} tokens, {counting}"
            scores, _ = decoding.evaluate_task(model, cut, task, tokenizer, reading, accelerator, label)
            counted = usage.read_usage(model, accelerator)
            rows.append({
                "input_length": length, "mean_length": round(sum(map(len, ids)) / len(ids), 3),
                "counting": counting, "usage": counted, "scores": scores,
                "entropy": {stack: usage.layer_entropies(grid) for stack, grid in counted.items()},
            })  # fmt: skip
            means = ", ".join(f"{stack} {sum(h) / len(h):.4f}" for stack, h in rows[-1]["entropy"].items())
            accelerator.print(f"{label}: mean entropy {means}")
    if accelerator.is_main_process:
        write_json(
            folder / f"{name}.json",
            {"command": provenance.command(), "versions": provenance.versions(), "identity": identity, "rows": rows},
        )


if __name__ == "__main__":
    run(main, globals())
