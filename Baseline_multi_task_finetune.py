"""3  The baseline: joint fine-tuning of the pre-trained model on all tasks.

Reads   DATA_DIR/{task} (datasets_preprocessing.py), BASE_MODEL_PATH, and the single-task histories in SOURCE_PICKLE_PATH,
        by which Overall is measured (single_task_finetune.py).
Writes  MODEL_SAVE_PATH/Baseline_[{experts_num}]_ep{n}.pt (n: the best epoch by Overall on validation), the same weights as
        the Hugging Face folder Baseline_[{experts_num}], and PICKLE_PATH/Baseline_[{experts_num}].pkl and .json.
Takes   at tiny about two minutes on 2 CPU cores; at paper some days on one GPU. Interrupted, it goes on.
"""

from expert_merging.run.constants import run

experts_num = 8  # experts in each sparse layer
same_compute = False  # train longer, by as many examples as the single-task models took together
current_case_name = "Baseline"


def main(c):
    from pathlib import Path

    from expert_merging.switch.models import preflight

    preflight(c, c.task_types, c.experts_num)

    from expert_merging.core import hub
    from expert_merging.data import features
    from expert_merging.run import results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.training import families, finetuning, overall

    accelerator = make_accelerator(c, can_shard=True)
    name = results.run_name(c.current_case_name, c.experts_num)
    work = Path(c.MODEL_SAVE_PATH) / f"{name}.run"
    goals = overall.single_task_goals(
        c.SOURCE_PICKLE_PATH.format(experts=c.experts_num), c.task_types, c.experts_num, c
    )

    # All tasks as features, and the pre-trained model.
    tokenizer = hub.load_tokenizer(c.BASE_MODEL_PATH.format(experts=c.experts_num))
    data = {task: features.load(task, c, tokenizer) for task in c.task_types}
    model, ancestor = families.load_base(c, c.experts_num)
    identity = results.identity(c, ancestor=ancestor, data=finetuning.data_hashes(c, list(data)), goals=goals)
    if results.is_done(f"{c.PICKLE_PATH}/{name}.json", identity, work, again="train"):
        return
    epochs = c.num_epochs + (finetuning.epochs_worth(data, c.num_epochs) if c.same_compute else 0)

    # Fine-tune jointly; the best epoch by Overall on validation is kept and tested.
    finetuning.finetune(
        c, accelerator, model, tokenizer, data, name=name, save_as=name + "_ep{epoch}.pt",
        work=work, identity=identity, goals=goals, num_epochs=epochs,
        models_folder=Path(c.MODEL_SAVE_PATH), histories_folder=Path(c.PICKLE_PATH),
    )  # fmt: skip


if __name__ == "__main__":
    run(main, globals())
