"""Expert usage of a single-task model, counted again: both ways, and with the inputs cut to several lengths.

Reads   DATA_DIR/{task_type} and SOURCE_MODEL_WEIGHT_PATH/single_task_{task_type} (single_task_finetune.py).
Writes  SOURCE_PICKLE_PATH/expert_usage_{task_type}.json: for each length and way of counting the tokens that every expert
        got on validation, and the normalised entropies. CAEM's reading `paper+counts` takes its usage from here.
Takes   at tiny about a minute on 2 CPU cores.
"""

from expert_merging.core.scales import by_scale
from expert_merging.run.constants import run

task_type = "squad"  # ag_news | squad | xsum | doc_topic | doc_qa | doc_summary
num_expert = 8  # experts in each sparse layer
input_lengths = by_scale(paper=(50, 100, 200, 400), night=(16, 32, 64, 128, 256), tiny=(16, 32, 64, 128))  # and uncut


def main(c):
    from pathlib import Path

    from expert_merging.core.errors import at_least
    from expert_merging.switch.models import preflight

    preflight(c, [c.task_type])
    at_least(c, 1, "input_lengths")

    from expert_merging.analysis import usage_by_length
    from expert_merging.core.hub import load_tokenizer
    from expert_merging.core.safetensors_folder import SafetensorsFolder
    from expert_merging.data import features
    from expert_merging.run import results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.switch import models
    from expert_merging.training import finetuning, overall

    accelerator = make_accelerator(c)
    model_folder = Path(c.SOURCE_MODEL_WEIGHT_PATH.format(experts=c.num_expert)) / f"single_task_{c.task_type}"
    folder = Path(c.SOURCE_PICKLE_PATH.format(experts=c.num_expert))
    overall.single_task_history(str(folder), c.task_type, c.num_expert, c)
    digests = SafetensorsFolder(model_folder).sha256()
    tokenizer = load_tokenizer(str(model_folder), "SOURCE_MODEL_WEIGHT_PATH")
    validation = features.load(c.task_type, c, tokenizer)["validation"]
    path = folder / f"expert_usage_{c.task_type}.json"
    identity = results.identity(c, weights=digests, data=finetuning.data_hashes(c, [c.task_type]))
    if results.is_done(path, identity, again="count"):
        return

    model = models.load_model(model_folder, "SOURCE_MODEL_WEIGHT_PATH").to(accelerator.device)
    lengths = [*(n for n in c.input_lengths if n < c.max_input_length), c.max_input_length]
    rows = usage_by_length.rows(c, accelerator, model, c.task_type, validation, tokenizer, lengths)
    if accelerator.is_main_process:
        results.save(path, identity, {"rows": rows})


if __name__ == "__main__":
    run(main, globals())
