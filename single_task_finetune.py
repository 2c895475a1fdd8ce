"""2  One task, one mixture of experts; the usage of its experts is counted and pickled.

Reads   DATA_DIR/{task_type} (datasets_preprocessing.py) and BASE_MODEL_PATH.
Writes  SOURCE_MODEL_WEIGHT_PATH/single_task_{task_type}.pt, the same weights as a Hugging Face folder without the .pt, and
        SOURCE_PICKLE_PATH/single_task_{task_type}.pkl and .json: scores, losses, expert usage on validation and its entropy.
Takes   at tiny about a minute on 2 CPU cores; at paper a day or so on one GPU. Interrupted, it goes on.
"""

from expert_merging.run.constants import run

task_type = "squad"  # ag_news | squad | xsum | doc_topic | doc_qa | doc_summary
num_expert = 8  # experts in each sparse layer of the base model


def main(c):
    from pathlib import Path

    from expert_merging.switch.models import preflight

    preflight(c, [c.task_type], c.num_expert)

    from expert_merging.core import hub
    from expert_merging.data import features
    from expert_merging.run import results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.training import families, finetuning

    accelerator = make_accelerator(c, can_shard=True)
    name = f"single_task_{c.task_type}"
    models_folder = Path(c.SOURCE_MODEL_WEIGHT_PATH.format(experts=c.num_expert))
    histories_folder = Path(c.SOURCE_PICKLE_PATH.format(experts=c.num_expert))
    work = models_folder / f"{name}.run"

    # The task as features, and the pre-trained model.
    tokenizer = hub.load_tokenizer(c.BASE_MODEL_PATH.format(experts=c.num_expert))
    data = {c.task_type: features.load(c.task_type, c, tokenizer)}
    model, ancestor = families.load_base(c, c.num_expert)
    identity = results.identity(c, ancestor=ancestor, data=finetuning.data_hashes(c, list(data)))
    if results.is_done(histories_folder / f"{name}.json", identity, work, again="train"):
        return

    # Fine-tune; the best epoch by validation is kept, tested, and its expert usage on validation noted.
    finetuning.finetune(
        c, accelerator, model, tokenizer, data, name=name, save_as=f"{name}.pt", work=work,
        identity=identity, models_folder=models_folder, histories_folder=histories_folder,
    )  # fmt: skip


if __name__ == "__main__":
    run(main, globals())
